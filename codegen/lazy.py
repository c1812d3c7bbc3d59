"""Tensors that are computed when somebody reads them: shape and dtype are known, there is no storage.

`Lazy` is what all of them share; `codegen.weights` has one for adapted weights, the runtime one for logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

Tensor = torch.Tensor

_GETTERS = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn")
METADATA = {getattr(Tensor, name).__get__ for name in (*_GETTERS, "is_cuda", "is_cpu", "is_meta", "is_sparse")} | {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.is_contiguous, Tensor.__len__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
_GRADIENT = Tensor.grad.__get__  # type: ignore[attr-defined]
_POINTERS = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage_offset}


class Lazy(Tensor):
    """A tensor that is formed only where a reader cannot do without it.

    Everything that asks for more than metadata gets the dense values, also what overrides of torch functions do not
    see (a custom `autograd.Function`, an extension); gradients reach what the values are made of.
    """

    kept: Tensor | None  # the values behind a pointer that was handed out

    def dense(self) -> Tensor:
        """The values, differentiable."""
        raise NotImplementedError

    @classmethod
    def read(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a torch function that needs no dense values; `NotImplemented` for every other one."""
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is _GRADIENT:  # of what is computed there is none; asking a tensor would warn of that
            return None
        if (result := cls.read(func, args, kwargs)) is not NotImplemented:
            return result
        if func in _POINTERS:
            lazy = args[0]
            lazy.kept = lazy.dense().detach() if lazy.kept is None else lazy.kept
            return func(lazy.kept, *args[1:], **kwargs)
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def plain(value: Any) -> Any:
    """The dense values of a lazy tensor; everything else as it is."""
    return value.dense() if isinstance(value, Lazy) else value


def hollow(cls: type[Tensor], shape: Any, **options: Any) -> Any:
    """A tensor of a class without storage; only an `autograd.Function` that returns it ties it to anything."""
    return Tensor._make_wrapper_subclass(cls, shape, **options)  # type: ignore[attr-defined]
