"""Logits that a compiled training step returns without having computed them: the first reader pays for them.

The compiled graph returns the head's input; `LazyLogits` stands for what the head makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rewrite.codegen.lazy import Lazy, hollow
from rewrite.errors import RewriteError
from rewrite.passes.deferred import Deferred

Tensor = torch.Tensor
_CASTS = {Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16}
_CASTS |= {Tensor.bfloat16: torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How logits are made: the head's program, what it reads, and the autocast state that it was compiled for."""

    program: fx.GraphModule
    tensors: tuple[Any, ...]
    versions: tuple[int | None, ...]
    autocast: tuple[bool, torch.dtype]
    casts: tuple[torch.dtype, ...] = ()

    def __call__(self, *tensors: Any) -> Tensor:
        """The logits from `tensors`, in the order of `self.tensors`, with gradients if they have any."""
        on, autocast = self.autocast
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(tensors[0].device.type, dtype=autocast, enabled=on):
                logits = self.program(*tensors)
            for dtype in self.casts:
                logits = logits.to(dtype)
        return logits

    def check(self) -> None:
        """Raises `RewriteError` where the head is no longer what it was when the loss was computed."""
        if self.versions != versions(self.tensors):
            raise RewriteError(
                "these logits were not computed with the loss, and the weights of their head have changed since: read "
                "them before optimizer.step(), or compile with chunked_loss=False"
            )


class LazyLogits(Lazy):
    """The logits of a training step, computed by the first operation that reads them, once, and differentiable."""

    recipe: Recipe
    made: Tensor | None

    def dense(self) -> Tensor:
        if self.made is None:
            self.recipe.check()
            self.made = self.recipe(*self.recipe.tensors)
        return self.made

    @classmethod
    def read(cls, func: Any, args: Any, kwargs: Any) -> Any:
        lazy = args[0] if args else None
        if not isinstance(lazy, LazyLogits) or lazy.made is not None or kwargs:
            return NotImplemented
        if func in (Tensor.detach, Tensor.detach_) and len(args) == 1:
            tensors = tuple(t.detach() if isinstance(t, Tensor) else t for t in lazy.recipe.tensors)
            return lazy_logits(replace(lazy.recipe, tensors=tensors), lazy.shape, lazy.dtype)
        dtype = args[1] if func is Tensor.to and len(args) == 2 else _CASTS.get(func)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return lazy_logits(replace(lazy.recipe, casts=(*lazy.recipe.casts, dtype)), lazy.shape, dtype)
        return NotImplemented


class _Tie(torch.autograd.Function):
    """Ties lazy logits to what they are made of, for readers that bypass `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, shape: Sequence[int], dtype: torch.dtype, *tensors: Any) -> Tensor:
        ctx.recipe = recipe
        return hollow(LazyLogits, shape, dtype=dtype, device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.recipe.check()
        tensors = [t.detach() if isinstance(t, Tensor) else t for t in ctx.recipe.tensors]
        wanted = [t.requires_grad_() for t, need in zip(tensors, ctx.needs_input_grad[3:], strict=True) if need]
        found = iter(torch.autograd.grad(ctx.recipe(*tensors), wanted, gradients, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in ctx.needs_input_grad[3:])


def lazy_logits(recipe: Recipe, shape: Sequence[int], dtype: torch.dtype) -> LazyLogits:
    """Logits of a known shape and dtype that `recipe` makes when they are read."""
    logits: Any = _Tie.apply(recipe, tuple(shape), dtype, *recipe.tensors)
    logits.recipe, logits.made, logits.kept = recipe, None, None
    return logits


def versions(tensors: Sequence[Any]) -> tuple[int | None, ...]:
    """How often each tensor has been changed in place."""
    return tuple(t._version if isinstance(t, Tensor) and not t.is_inference() else None for t in tensors)


def returning(compiled: Callable[..., Any], outputs: int, deferred: Sequence[Deferred]) -> Callable[..., Any]:
    """`compiled` with what it deferred in place of the activations that it returns for it; `outputs` in all."""

    def call(*args: Any) -> Any:
        found = list(compiled(*args))
        results = found[:outputs]
        for each in deferred:
            cut = [found[i] for i in each.cut]
            tensors = (*cut, *(args[i] for i in each.inputs))
            device = cut[0].device.type
            autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            recipe = Recipe(each.program, tensors, versions(tensors), autocast)
            results[each.output] = lazy_logits(recipe, (*cut[0].shape[:-1], each.classes), each.dtype)
        return tuple(results)

    return call if deferred else compiled
