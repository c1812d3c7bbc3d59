"""merge: writes every adapter into the base weights, in place, and measures what that costs in precision."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from tqdm import tqdm

from rewrite.errors import RewriteError
from rewrite.runtime import untying
from rewrite.runtime.attach import Attachment, adapter_of, original, put_back, require, strip
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
def merge(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Merge all adapters of `model` in place and return it: a plain model without any trace of us.

    A weight that an adapted module shares with modules that are not adapted alike is an error, or, with `untie`,
    becomes that module's own (`config.tie_word_embeddings` is then false, so that saving keeps both).

    Raises `RewriteError`, before anything is changed, where a method has no merged form, or for a shared weight.
    """
    state = require(model)
    _check(model, state)
    tied = _tied(model, state)
    if tied:
        untying.check(model, tied, untie, state.grafts)
        state.requires_grad |= untying.untie(model, tied, state.requires_grad)
    worst, where, decoded = 0.0, "", 0
    weights = _weights(state)
    for (path, tensor), grafts in tqdm(weights.items(), desc="merge", delay=2, leave=False):
        error = _merge_weight(model, path, tensor, grafts, state)
        decoded += any(g.where == "storage" for g in grafts)
        if error > worst:
            worst, where = error, path
    strip(model)
    report = _reports[model] = MergeReport(state.spec, len(weights), decoded, worst, where)
    log.info("%s", report)
    return model


def _weights(state: Attachment) -> dict[tuple[str, str], list[Graft]]:
    """The grafts of every weight that a merge writes, in the order in which they take hold."""
    found: dict[tuple[str, str], list[Graft]] = {}
    for graft in sorted(state.grafts, key=lambda g: g.stage):
        if graft.where != "train":
            found.setdefault((graft.path, graft.tensor), []).append(graft)
    return found


def _merge_weight(model: nn.Module, path: str, tensor: str, grafts: list[Graft], state: Attachment) -> float:
    """Write what the grafts make of one weight; the relative rounding error of doing so."""
    module = model.get_submodule(path)
    parameter = original(module, tensor)
    base = parameter if parameter is not None else _decoded(module, tensor)
    exact = base.detach().to(torch.float64)
    for graft in grafts:
        if graft.where != "storage":
            exact = _merged(exact, base.dtype, module, graft)
    rounded = exact.to(base.dtype)
    if parameter is None:
        parameter = nn.Parameter(rounded.contiguous(), requires_grad=False)
    else:
        parameter.copy_(rounded)
    for place in dict.fromkeys(p for graft in grafts if graft.where in ("weight", "storage") for p in graft.places):
        put_back(model.get_submodule(place), tensor, parameter, state.order[place])
    if not exact.numel() or all(graft.where == "storage" for graft in grafts):
        return 0.0
    return float((rounded.to(torch.float64) - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def _decoded(module: nn.Module, tensor: str) -> torch.Tensor:
    """The dense weight behind stored tensors, before any other graft on it."""
    stored: Any = module._modules["parametrizations"]
    held = stored[tensor]
    return held[0](*(getattr(held, f"original{i}") for i in range(held.ntensors)))


def _merged(exact: torch.Tensor, dtype: torch.dtype, module: nn.Module, graft: Graft) -> torch.Tensor:
    """A weight in float64 with one graft merged into it; what it makes of the bias is written there."""
    assert graft.merged is not None
    theta = [t.detach().to(torch.float64) if t.is_floating_point() else t for t in adapter_of(module, graft).operands()]
    bias = module._parameters.get("bias") if graft.tensor == "weight" else None
    before = None if bias is None else bias.detach().to(torch.float64)
    weight, after = graft.merged(exact, before, *theta)
    if after is not None and after is not before:
        _write_bias(module, after, dtype)
    return weight


def _write_bias(module: nn.Module, value: torch.Tensor, dtype: torch.dtype) -> None:
    bias = module._parameters.get("bias")
    if bias is not None:
        bias.copy_(value)
        return
    module.register_parameter("bias", nn.Parameter(value.to(dtype), requires_grad=False))


def _check(model: nn.Module, state: Attachment) -> None:
    """What has no merged form, found before anything is changed."""
    for graft in state.grafts:
        if graft.where in ("input", "output", "weight") and graft.merged is None:
            raise RewriteError(
                f"{graft.label} at {graft.path} changes activations, it has no merged weight: rewrite.remove it, "
                "or keep the model as it is"
            )
        if graft.where == "side":
            raise RewriteError(
                f"{graft.label} is a network beside the model, it has no merged weight: rewrite.remove it, or keep the "
                "model as it is"
            )
        if graft.where in ("tokens", "past"):
            raise RewriteError(
                f"{graft.label} adds virtual tokens, it has no merged weight: rewrite.remove it, or keep the model "
                "as it is"
            )
        if graft.gated and graft.where != "train" and adapter_of(model.get_submodule(graft.path), graft).gate.ndim:
            raise RewriteError("the rows of a batch use different adapters: rewrite.use(model, ...) one, then merge")


def _tied(model: nn.Module, state: Attachment) -> untying.Tied:
    """The adapted weights that others, which are not adapted alike, share."""
    users: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):  # counted at the module that it belongs to
            continue
        parametrised: Any = module._modules.get("parametrizations") or ()
        for tensor in (*module._parameters, *parametrised):
            if (parameter := original(module, tensor)) is not None:
                users.setdefault(id(parameter), []).append((path, tensor))
    found = {}
    for graft in state.grafts:
        parameter = original(model.get_submodule(graft.path), graft.tensor)
        if graft.where not in ("train", "storage") and parameter is not None:
            alike = {(path, graft.tensor) for path in graft.places}
            others = tuple(user for user in users[id(parameter)] if user not in alike)
            if others:
                found[graft.path, graft.tensor] = graft, others
    return found
