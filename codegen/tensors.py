"""What operators ask of their arguments: whether they hold numbers, what their rows are, which dtype autocast wants."""

from __future__ import annotations

import contextlib

import torch

Tensor = torch.Tensor


def is_eager(*tensors: Tensor) -> bool:
    """Whether these are plain tensors in a plain call: nothing is traced, and a dispatch mode made none of them.

    >>> is_eager(torch.ones(2), torch.nn.Parameter(torch.ones(2)))
    True
    """
    return not torch.compiler.is_compiling() and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def as_rows(x: Tensor) -> Tensor:
    """(..., n) as a matrix of rows, a view where that is possible; n may be 0.

    >>> as_rows(torch.ones(2, 3, 5)).shape
    torch.Size([6, 5])
    """
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums of such numbers: float32 at least.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of products on the device of x where autocast is on, else None."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in that dtype, as autocast casts: what is floating point, but not float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype not in (dtype, torch.float64) else t


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Where products are of the dtypes that they are given, on the device of x.

    Autocast reaches into operators, below autograd, and keeps what it casts there: a parameter that it has cast in one
    would be cast without a derivative for all that follow.
    """
    off = autocast_dtype(x) is None
    return contextlib.nullcontext() if off else torch.autocast(x.device.type, enabled=False)
