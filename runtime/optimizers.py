"""Optimizers as a spec asks for them: any class of `torch.optim`, over gradients that are made or used another way.

Both kinds here apply the rule of the class to one tensor at a time and free its gradient at once: one that gets exact
gradients inside the backward pass (`fused`), and one that estimates them from losses (`zeroth`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.runtime.attach import require
from rewrite.runtime.training import gradient_of, parameter_groups

Tensor = torch.Tensor
Closure = Callable[[], Any]
PIECE = 1 << 20
"""Entries for which random numbers are made at a time: all the memory that a perturbation takes."""


def optimizer(
    model: nn.Module,
    cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    adapter: str | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """An optimizer of the class `cls` over all that trains, now or later, as the spec of `model` asks for.

    Usually that is `cls(rewrite.parameter_groups(model, lr, weight_decay), **settings)`.  With `fused_update` each
    tensor is updated inside the backward pass, as soon as its gradient is there, which is freed at once: `step` has
    nothing left to do, and gradients can be neither accumulated nor clipped.  With `mezo` there is no
    backward pass: the rule of `cls` (the paper's is `torch.optim.SGD`) is applied to an estimate, and `step` wants a
    closure that returns the loss.

    A loop that gives `step` a closure works with every spec:

        def closure():
            optimizer.zero_grad()
            loss = model(**batch).loss
            if loss.requires_grad:
                loss.backward()
            return loss

        loss = optimizer.step(closure)
        rewrite.step(model, optimizer)

    Example: `optimizer = rewrite.optimizer(model, torch.optim.AdamW, lr=2e-4)`
    """
    groups, gradient = parameter_groups(model, lr, weight_decay, adapter=adapter), gradient_of(model)
    require(model).handles.release()  # of an optimizer before this one
    if gradient == "exact":
        return cls(groups, **settings)  # type: ignore[call-arg]
    if inspect.signature(cls.step).parameters["closure"].default is inspect.Parameter.empty:
        raise RewriteError(f"{cls.__name__} evaluates the loss as often as it likes: it cannot go tensor by tensor")
    made: Any = _tensor_by_tensor(_KINDS[gradient], cls)(groups, **settings)
    made.follow(model)
    return made


@functools.cache
def _tensor_by_tensor(kind: type, cls: type[torch.optim.Optimizer]) -> type[Any]:
    return type(f"{kind.__name__}{cls.__name__}", (kind, cls), {})


class _OneByOne(torch.optim.Optimizer):
    """What stands before an optimizer class to apply its rule to one tensor at a time; state is kept as ever."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        places: dict[int, int] = self.__dict__.setdefault("_places", {})
        places |= {id(p): number for p in self.param_groups[number]["params"]}

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """The rule of the class for this tensor and its gradient, which is freed."""
        groups = self.param_groups
        self.param_groups = [{**groups[self._places[id(parameter)]], "params": [parameter]}]  # type: ignore[attr-defined]
        try:
            super().step()
        finally:
            self.param_groups = groups
            parameter.grad = None


class Fused(_OneByOne):
    """Updates a tensor inside the backward pass, as soon as its gradient is whole."""

    def follow(self, model: nn.Module) -> None:
        """Hook every tensor; the hooks go with the adapters, or with the next optimizer."""
        self._done: set[int] = set()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            working = parameter.requires_grad
            parameter.requires_grad_(True)  # what rests now can be hooked as well
            require(model).handles.append(parameter.register_post_accumulate_grad_hook(self._ready))
            parameter.requires_grad_(working)

    def _ready(self, parameter: Tensor) -> None:
        if id(parameter) in self._done:
            raise RewriteError(
                "fused_update has updated this tensor in the backward pass before, so gradients cannot be accumulated: "
                "call optimizer.step() after every backward(), or leave fused_update out of the spec"
            )
        self._done.add(id(parameter))
        self.update(parameter)

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Runs the closure, which runs the backward pass; without one, all is done already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._done.clear()
        return loss


class ZerothOrder(_OneByOne):
    """Estimates gradients from losses at both sides of the tensors, along random directions (`mezo`).

    `estimates` are the (seed, projected gradient) of the last step: all that it needed to know.
    """

    estimates: list[tuple[int, float]]

    def follow(self, model: nn.Module) -> None:
        self.model, self.estimates = model, []
        self.regime = next(r for r in require(model).regimes if r.gradient == "zeroth")
        self._seeds = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step along the estimate; returns the mean of the losses.  The model is in evaluation mode meanwhile."""
        if closure is None:
            raise RewriteError("mezo has no gradients: optimizer.step(lambda: model(**batch).loss)")
        losses: list[Tensor] = []
        with _evaluating(self.model):
            count = self.regime.directions
            seeds = torch.randint(2**62, (count,), generator=self._seeds).tolist()
            self.estimates = [(seed, self._along(seed, closure, losses)) for seed in seeds]
        streams = [(self.streams(seed), projected / count) for seed, projected in self.estimates]
        for parameter in self.working():
            parameter.grad = torch.zeros_like(parameter)
            for stream, factor in streams:
                perturb(parameter.grad, factor, stream[parameter.device])
            self.update(parameter)
        return torch.stack(losses).mean()

    def _along(self, seed: int, closure: Closure, losses: list[Tensor]) -> float:
        """The slope of the loss along one direction; the tensors are as before afterwards, but for rounding."""
        eps, away, found = self.regime.eps, 0.0, list[float]()
        try:
            for target in (eps, -eps):
                self._move(seed, target - away)
                away = target
                loss = torch.as_tensor(closure()).detach().mean()
                losses.append(loss)
                found.append(float(loss))
        finally:
            self._move(seed, -away)
        return (found[0] - found[1]) / (2 * eps)

    def _move(self, seed: int, distance: float) -> None:
        streams = self.streams(seed)
        for parameter in self.working() if distance else ():
            perturb(parameter, distance, streams[parameter.device])

    def working(self) -> Iterator[Tensor]:
        """What is at work, in a fixed order."""
        return (p for group in self.param_groups for p in group["params"] if p.requires_grad)

    def streams(self, seed: int) -> dict[torch.device, torch.Generator]:
        """The random numbers of one direction, on every device that holds a tensor."""
        return {d: torch.Generator(d).manual_seed(seed) for d in {p.device for p in self.working()}}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seeds": self._seeds.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        self._seeds.set_state(rest.pop("seeds"))
        super().load_state_dict(rest)


_KINDS: dict[str, type] = {"fused": Fused, "zeroth": ZerothOrder}


def perturb(tensor: Tensor, distance: float, stream: torch.Generator) -> None:
    """`tensor += distance * z`, z standard normal from `stream`, in place and a piece at a time."""
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    memory = tensor.permute(order)
    pieces = memory.view(-1).split(PIECE) if memory.is_contiguous() else (tensor,)
    for piece in pieces:
        z = torch.empty(piece.shape, dtype=tensor.dtype, device=tensor.device).normal_(generator=stream)
        piece.add_(z, alpha=distance)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
