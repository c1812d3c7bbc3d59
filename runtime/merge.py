"""merge: writes every adapter into the base weights, in place, and measures what that costs in precision."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from rewrite.errors import RewriteError
from rewrite.runtime.adapter import Adapter
from rewrite.runtime.attach import Attachment, adapted_modules, put_back, require, strip
from rewrite.runtime.graft import Graft

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """How many weights a merge wrote, and its largest rounding error, relative to the largest weight there."""

    spec: str
    weights: int
    decoded: int
    error: float
    worst: str

    def __str__(self) -> str:
        text = f"merged '{self.spec}' into {self.weights} weights"
        if self.decoded:
            text += f", {self.decoded} of them decoded from a quantised base (a dense copy replaces the codes)"
        return text + (f"; largest rounding error {self.error:.1e} at {self.worst}" if self.worst else "")


# Outside of the model: a merged model carries no trace of us.
_reports: weakref.WeakKeyDictionary[nn.Module, MergeReport] = weakref.WeakKeyDictionary()


def merge_report(model: nn.Module) -> MergeReport | None:
    """The report of the last merge of this model, if it was merged in this process."""
    return _reports.get(model)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Merge all adapters of `model` in place and return it: a plain model without any trace of us.

    Raises `RewriteError`, before anything is changed, where a method has no merged form, or where a weight is
    shared with a module that is not adapted alike.
    """
    state = require(model)
    _check(model, state)
    worst, where, written, decoded = 0.0, "", 0, 0
    adapted = {path: adapters for path, _, adapters in adapted_modules(model)}
    stored = {g.path: g for g in state.grafts if g.where in ("storage", "weight")}
    for path in tqdm(dict.fromkeys([*stored, *adapted]), desc="merge", delay=2, leave=False):
        module = model.get_submodule(path)
        if path in stored:
            _densify(module, stored[path].tensor, state.order[path])
            decoded += stored[path].where == "storage"
        error = _merge_module(module, adapted.get(path, []))
        written += 1
        if error > worst:
            worst, where = error, path
    strip(model)
    report = _reports[model] = MergeReport(state.spec, written, decoded, worst, where)
    log.info("%s", report)
    return model


def _densify(module: nn.Module, name: str, order: Sequence[str]) -> None:
    """Replace a parametrised tensor by what it evaluates to, as an ordinary parameter."""
    dense = getattr(module, name).detach().clone(memory_format=torch.contiguous_format)
    put_back(module, name, dense, order)


def _merge_module(module: nn.Module, adapters: list[Adapter]) -> float:
    """Add the updates of one module to its weight and bias; the relative rounding error of doing so."""
    if not adapters:
        return 0.0
    weight = module.get_parameter("weight")
    exact = weight.detach().to(torch.float64)
    for adapter in adapters:
        assert adapter.graft.delta is not None
        update = adapter.graft.delta(*adapter.tensors().values()).map(lambda t: t.detach().to(torch.float64))
        adapter.graft.view(exact).add_(update.materialise())
        if (shift := update.shift()) is not None:
            _add_bias(module, adapter.graft, weight, shift)
    rounded = exact.to(weight.dtype)
    weight.copy_(rounded)
    if not weight.numel():
        return 0.0
    return float((rounded.to(torch.float64) - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def _add_bias(module: nn.Module, graft: Graft, weight: torch.Tensor, shift: torch.Tensor) -> None:
    width = weight.shape[1] if graft.transposed else weight.shape[0]
    if module._parameters.get("bias") is None:
        module.register_parameter("bias", nn.Parameter(weight.new_zeros(width), requires_grad=False))
    start, stop = graft.rows or (0, width)
    bias = module.get_parameter("bias")
    bias[start:stop] = (bias[start:stop].to(torch.float64) + shift).to(bias.dtype)


def _check(model: nn.Module, state: Attachment) -> None:
    """Everything that could stop a merge, found before it starts."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            users.setdefault(id(weight), []).append(path)
    for graft in state.grafts:
        if graft.where == "output" and graft.delta is None:
            raise RewriteError(
                f"{graft.label} at {graft.path} changes activations, it has no merged weight: rewrite.remove it, "
                "or keep the model as it is"
            )
        module = model.get_submodule(graft.path)
        shared = users.get(id(module._parameters.get("weight")), [graft.path])
        if graft.where == "output" and len(shared) > 1:
            others = ", ".join(p for p in shared if p != graft.path)
            raise RewriteError(
                f"cannot merge {graft.label} at {graft.path}: its weight is shared with {others}, which would change "
                "too. Nothing was merged."
            )
