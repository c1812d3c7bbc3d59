"""calibrate: starts that depend on data.  One pass over some batches, then every adapter that asks is filled anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rewrite.errors import RewriteError
from rewrite.runtime.attach import adapter_of, require
from rewrite.runtime.graft import Graft

Tensor = torch.Tensor
Loss = Callable[[Any], Tensor]


@dataclass
class Seen:
    """What one site saw: the sum of its inputs (d_in,), of their outer products (d_in, d_in), of their squares alone
    (d_in,), or the gradient of its weight (d_out, d_in), summed over `count` rows or `batches`, in float64."""

    count: int = 0
    batches: int = 0
    total: Tensor | None = None
    moment: Tensor | None = None
    squares: Tensor | None = None
    gradient: Tensor | None = None

    def scales(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()
        squares = rows.square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += len(rows)

    def inputs(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()
        total, moment = rows.sum(0), rows.t() @ rows
        self.total = total if self.total is None else self.total + total
        self.moment = moment if self.moment is None else self.moment + moment
        self.count += len(rows)

    def gradients(self, x: Tensor, dy: Tensor) -> None:
        gradient = dy.flatten(0, -2).double().t() @ x.detach().flatten(0, -2).double()
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.batches += 1


def calibrate(model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None) -> nn.Module:
    """Start the adapters that learn from data (`init=eva`, `corda`, `lora_ga`) from these batches, in place.

    A batch is a mapping of keyword arguments, a sequence of positional ones, or one tensor.  `loss(output)` is needed
    for methods that look at gradients; without it the model's output must have a `.loss`.  Nothing is changed when a
    batch fails.  Call it before training: what was learned so far is overwritten.

    Raises `RewriteError` where nothing asks for data, there is no batch, or a site was not reached.

    Example: `rewrite.calibrate(model, itertools.islice(loader, 16))`
    """
    grafts = [g for g in require(model).grafts if g.behaviour is not None and g.behaviour.calibrated is not None]
    if not grafts:
        raise RewriteError("nothing in this model starts from data: use an init that does, e.g. lora(init=eva)")
    by_gradient = any(g.behaviour and g.behaviour.calibration == "gradients" for g in grafts)
    seen = {id(graft): Seen() for graft in grafts}
    with _watched(model, grafts, seen), torch.set_grad_enabled(by_gradient):
        for batch in tqdm(batches, desc="calibrate"):
            output = _forward(model, batch)
            if by_gradient:
                value = loss(output) if loss is not None else getattr(output, "loss", None)
                if value is None:
                    raise RewriteError("gradients need a loss: pass batches with labels, or loss=...")
                torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    missed = [g.path for g in grafts if not (seen[id(g)].count or seen[id(g)].batches)]
    if missed:
        raise RewriteError(f"no batch reached {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}")
    with torch.no_grad():
        for graft in grafts:
            _fill(model, graft, seen[id(graft)])
    return model


def _fill(model: nn.Module, graft: Graft, seen: Seen) -> None:
    module = model.get_submodule(graft.path)
    tensors, behaviour = adapter_of(module, graft).tensors(), graft.behaviour
    assert behaviour is not None
    assert behaviour.calibrated is not None
    W = graft.view(getattr(module, graft.tensor).detach())
    dtype = next(iter(tensors.values())).dtype
    behaviour.calibrated(W.to(dtype), tensors, seen)


@contextmanager
def _watched(model: nn.Module, grafts: Sequence[Graft], seen: Mapping[int, Seen]) -> Iterator[None]:
    """Hooks on every module that is looked at, in evaluation mode; all as it was afterwards."""
    with ExitStack() as stack:
        training = [m for m in model.modules() if m.training]
        model.eval()
        stack.callback(lambda: [setattr(m, "training", True) for m in training])
        for graft in grafts:
            hook = _hook(graft, seen[id(graft)])
            handle = model.get_submodule(graft.path).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(graft: Graft, seen: Seen) -> Callable[..., None]:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        wanted = graft.behaviour.calibration if graft.behaviour else None
        if wanted == "gradients":
            output.register_hook(lambda dy: seen.gradients(x, dy if graft.rows is None else graft.rows.take(dy, -1)))
        elif wanted == "scales":
            seen.scales(x)
        else:
            seen.inputs(x)

    return look


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model.forward(**batch)
    return model.forward(*batch) if isinstance(batch, (tuple, list)) else model.forward(batch)
