"""Weights with a low-rank update that their layer does not read in its own call: experts, fused and tied weights.

- `rewrite::low_rank_weight(W, A, B, scale, transposed)`   W + scale * B A, the dense weight
- `low_rank_weight`   the same as a function; in an eager model, a `LazyWeight`

A `LazyWeight` stands for the dense weight without forming it: views and products go through `codegen.factored`,
everything else reads the dense weight.  Under tracing, in graphs and on tensor subclasses there is no lazy form.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import rewrite.codegen.products
import rewrite.codegen.views  # noqa: F401  (the table of readers)
from rewrite.codegen.factored import Factored, reader_of
from rewrite.codegen.lazy import Lazy, hollow, plain

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("low_rank_weight(Tensor W, Tensor A, Tensor B, float scale, bool transposed) -> Tensor")


def _dense(W: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    A, B = A.to(W.dtype), B.to(W.dtype)
    update = A.transpose(-2, -1) @ B.transpose(-2, -1) if transposed else B @ A
    return W + (update if scale == 1.0 else update * scale)


_lib.impl("low_rank_weight", _dense, "CompositeImplicitAutograd")


def low_rank_weight(W: Any, A: Any, B: Any, scale: float = 1.0, transposed: bool = False) -> Any:
    """`W + scale * B A` for a reader that is somewhere else: lazy in an eager model, one node in a graph.

    W (..., out, in), or (..., in, out) where `transposed`; A (..., r, in), B (..., out, r), cast to W's dtype.
    Leading dimensions (experts) are the same in all three.  Returns what behaves as a tensor of W's shape and dtype.

    >>> W, A, B = torch.zeros(2, 3, 4), torch.ones(2, 1, 4), torch.ones(2, 3, 1)
    >>> torch.nn.functional.linear(torch.ones(4), low_rank_weight(W, A, B)[0])
    tensor([4., 4., 4.])
    """
    if all(_is_plain(t) for t in (W, A, B)) and not _is_traced():
        return _lazy(Factored(W, A, B, scale, transposed))
    return torch.ops.rewrite.low_rank_weight(W, A, B, scale, transposed)


def _is_plain(t: Any) -> bool:
    return type(t) in (torch.Tensor, nn.Parameter, LazyWeight)


def _is_traced() -> bool:
    mode, key = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
        or any(mode(k) is not None for k in (key.FAKE, key.PROXY, key.FUNCTIONAL))
    )


def densify(w: Factored) -> Tensor:
    """The dense weight, differentiable."""
    return torch.ops.rewrite.low_rank_weight(w.W, w.A, w.B, w.scale, w.transposed)


class LazyWeight(Lazy):
    """A weight `W + scale * B A` that is formed only where a reader cannot do without it.

    It has the shape, dtype, device and strides of W.  What does not know it still gets the dense values, and their
    gradient still reaches A and B.
    """

    factored: Factored

    def dense(self) -> Tensor:
        return densify(self.factored)

    @classmethod
    def read(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _OPENED:
            return _OPENED[func](*args, **kwargs)
        if (reader := reader_of(func)) is None:
            return NotImplemented
        result = reader(*tree_map(_open, args), **tree_map(_open, kwargs))
        return tuple(map(_close, result)) if isinstance(result, tuple) else _close(result)


class _Tie(torch.autograd.Function):
    """Ties a lazy weight to its parts in autograd, for readers that bypass `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.dtype, ctx.scale, ctx.transposed = W.dtype, scale, transposed
        return hollow(LazyWeight, W.shape, strides=W.stride(), dtype=W.dtype, device=W.device, layout=W.layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dW,) = gradients
        A, B = ctx.saved_tensors
        G = dW.transpose(-2, -1) if ctx.transposed else dW
        dA = (B.to(G.dtype).transpose(-2, -1) @ G * ctx.scale).to(A.dtype) if ctx.needs_input_grad[1] else None
        dB = (G @ A.to(G.dtype).transpose(-2, -1) * ctx.scale).to(B.dtype) if ctx.needs_input_grad[2] else None
        return dW, dA, dB, None, None


def _lazy(w: Factored) -> LazyWeight:
    lazy: Any = _Tie.apply(w.W, plain(w.A), plain(w.B), w.scale, w.transposed)
    lazy.factored, lazy.kept = w, None
    return lazy


def _open(value: Any) -> Any:
    return value.factored if isinstance(value, LazyWeight) else value


def _close(value: Any) -> Any:
    return _lazy(value) if isinstance(value, Factored) else value


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `torch.nn.functional` whose inner calls see the tensors that it is given, overridden or not.

    Such a function hands itself over whole to tensors that override it, instead of the operations that it is made of.
    """
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


attention = opened(F.multi_head_attention_forward)
"""`F.multi_head_attention_forward` as the projections and the attention that it is made of."""

_OPENED = {F.multi_head_attention_forward: attention}
