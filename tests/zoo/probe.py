"""What every attention of a model multiplies, seen from outside: an independent check of the roles of projections.

It shares nothing with the resolver. Attention is caught where transformers looks its implementation up, where
`scaled_dot_product_attention` is called, and otherwise as the two products around a softmax.
What is no softmax attention (linear attention, state-space mixers) is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

try:
    from transformers.modeling_utils import AttentionInterface
except ImportError:
    AttentionInterface = None


@dataclass(frozen=True, eq=False)
class Operands:
    """Query, key and value of one attention, as multiplied (rotated, heads repeated), and the module that ran it."""

    q: Tensor
    k: Tensor
    v: Tensor
    where: str

    def moved(self, other: Operands) -> set[str]:
        """Which of "q", "k", "v" differ, in any bit, from another run's."""
        return {name for name in ("q", "k", "v") if not torch.equal(getattr(self, name), getattr(other, name))}


def attention_operands(model: nn.Module, batch: Mapping[str, Any]) -> list[Operands] | None:
    """The operands of every attention in one forward, in the order of the calls; None where none was seen.

    `attention_operands(model, {"input_ids": ids})[0].q` has the shape (batch, heads, tokens, head width) in most
    models. Random numbers drawn in the forward are the same in every call.
    """
    seen = _Recorder()
    with torch.no_grad(), torch.random.fork_rng(), _paths(model, seen), _lookups(seen), seen:
        torch.manual_seed(0)
        model(**batch)
    return seen.found or None


@contextlib.contextmanager
def _paths(model: nn.Module, seen: _Recorder) -> Iterator[None]:
    """Keeps the path of the innermost running module on `seen.path`."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: seen.path.append(name)))
        handles.append(module.register_forward_hook(lambda *_: seen.path.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _lookups(seen: _Recorder) -> Iterator[None]:
    """Whatever implementation a transformers model looks up is wrapped in one that records its operands."""
    if AttentionInterface is None:
        yield
        return
    look_up = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        attend = look_up(self, *args, **kwargs)

        def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
            seen.record(query, key, value)
            with seen.paused():
                return attend(module, query, key, value, *rest, **named)

        return recording

    with mock.patch.object(AttentionInterface, "get_interface", get_interface):
        yield


PRODUCTS = {
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    torch.functional.einsum,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.baddbmm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
FRESH = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.addmm, F.layer_norm, F.rms_norm, F.embedding}


@dataclass
class _Score:
    """What a tensor came from: the product of a query and a key, perhaps behind a softmax by now."""

    q: Tensor
    k: Tensor
    normalised: bool = False


@dataclass
class _Recorder(TorchFunctionMode):
    """Follows products of activations through element-wise operations and a softmax to the product with the value."""

    found: list[Operands] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    origins: dict[int, _Score] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # so that no id is used twice
    pauses: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pauses += 1
        try:
            yield
        finally:
            self.pauses -= 1

    def record(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if not self.pauses:
            where = self.path[-1] if self.path else ""
            self.found.append(Operands(*(each.detach().clone() for each in (q, k, v)), where))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.pauses:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Written in Python: its body is to be seen too, and must not ask this mode again.
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.record(*_first_three(args, kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.follow(func, [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)], result)
        return result

    def follow(self, func: Any, inputs: list[Tensor], result: Any) -> None:
        known = [self.origins[id(each)] for each in inputs if id(each) in self.origins]
        origin = known[0] if known else None
        if func in PRODUCTS:
            origin = self.product(inputs[-2:], known)
        elif func in SOFTMAXES and origin is not None:
            origin = _Score(origin.q, origin.k, normalised=True)
        elif func in FRESH:
            origin = None
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.origins.pop(id(each), None)
                if origin is not None and each.is_floating_point():
                    self.origins[id(each)] = origin
                    self.alive.append(each)

    def product(self, operands: list[Tensor], known: list[_Score]) -> _Score | None:
        """A product with weights behind a softmax is an attention; every other one of activations may be a score."""
        probabilities = next((each for each in known if each.normalised), None)
        if probabilities is not None:
            value = next((each for each in operands if not self.is_normalised(each)), None)
            if value is not None and not isinstance(value, nn.Parameter):
                self.record(probabilities.q, probabilities.k, value)
            return None
        if len(operands) < 2 or any(isinstance(each, nn.Parameter) or each.ndim < 3 for each in operands):
            return None
        return _Score(*(each.detach().clone() for each in operands))

    def is_normalised(self, value: Tensor) -> bool:
        return id(value) in self.origins and self.origins[id(value)].normalised


def _first_three(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
    q, k, v = (*args, *named)[:3]
    return q, k, v
