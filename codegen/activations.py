"""Nonlinearities that keep their derivative in a few bits instead of their input (S2A).

`coarse_activation(x, name, bits, parameter)` computes the function as it is; its backward multiplies by the stored
derivative.  4 bits are 16 levels with 0 and 1 among them; 1 bit is exact for functions of two slopes, such as ReLU, and
the step function for those that look like one (MobileTL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclass(frozen=True)
class Nonlinearity:
    """An elementwise function f: `derivative(ones, x, parameter)` is f'(x).

    In 4 bits f' is stored as the nearest (k - zero) / unit, k = 0 ... 15.  `slopes(parameter)` are its two values where
    it has no others; `step`: 1 for x > 0, else 0, is near enough to be asked for.
    """

    function: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, Tensor, float], Tensor]
    zero: int = 0
    unit: float = 15.0
    slopes: Callable[[float], tuple[float, float]] | None = None
    step: bool = False

    def bits(self, asked: int, approximate: bool) -> int | None:
        """In how many bits f' is stored where `asked` are; None where it is not, without being asked to approximate."""
        if self.slopes is not None:
            return 1
        if not approximate or (asked == 1 and not self.step):
            return None
        return asked


_GATE = {"zero": 2, "unit": 11.0, "step": True}  # f' from -0.13 to 1.13
NONLINEARITIES: dict[str, Nonlinearity] = {
    "silu": Nonlinearity(lambda x, _: F.silu(x), lambda g, x, _: aten.silu_backward(g, x), **_GATE),
    "gelu": Nonlinearity(lambda x, _: F.gelu(x), lambda g, x, _: aten.gelu_backward(g, x), **_GATE),
    "gelu_tanh": Nonlinearity(
        lambda x, _: F.gelu(x, approximate="tanh"),
        lambda g, x, _: aten.gelu_backward(g, x, approximate="tanh"),
        **_GATE,
    ),
    "mish": Nonlinearity(lambda x, _: F.mish(x), lambda g, x, _: aten.mish_backward(g, x), **_GATE),
    "hardswish": Nonlinearity(
        lambda x, _: F.hardswish(x), lambda g, x, _: aten.hardswish_backward(g, x), zero=4, unit=7.0, step=True
    ),
    "softplus": Nonlinearity(
        lambda x, _: F.softplus(x), lambda g, x, _: aten.softplus_backward(g, x, 1.0, 20.0), step=True
    ),
    "elu": Nonlinearity(lambda x, _: F.elu(x), lambda g, x, _: aten.elu_backward(g, 1.0, 1.0, 1.0, False, x)),
    "tanh": Nonlinearity(lambda x, _: torch.tanh(x), lambda g, x, _: aten.tanh_backward(g, torch.tanh(x))),
    "sigmoid": Nonlinearity(
        lambda x, _: torch.sigmoid(x), lambda g, x, _: aten.sigmoid_backward(g, torch.sigmoid(x)), unit=60.0
    ),
    "relu": Nonlinearity(
        lambda x, _: F.relu(x), lambda g, x, _: aten.threshold_backward(g, x, 0), slopes=lambda _: (0.0, 1.0)
    ),
    "relu6": Nonlinearity(
        lambda x, _: F.relu6(x), lambda g, x, _: aten.hardtanh_backward(g, x, 0, 6), slopes=lambda _: (0.0, 1.0)
    ),
    "leaky_relu": Nonlinearity(
        lambda x, slope: F.leaky_relu(x, slope),
        lambda g, x, slope: aten.leaky_relu_backward(g, x, slope, False),
        slopes=lambda slope: (slope, 1.0),
    ),
}


def bytes_of_derivative(shape: tuple[int, ...], bits: int) -> int:
    """What the derivative of a tensor of that shape takes in so many bits a value."""
    return torch.Size(shape[:-1]).numel() * -(-shape[-1] * bits // 8)


def coarse_activation(x: Tensor, name: str, bits: int, parameter: float = 0.0) -> Tensor:
    """The nonlinearity of that name, exactly; its backward is `dy * f'` with f' as it was stored.

    x (..., n); the derivative is kept as bytes (..., ceil(n bits / 8)).
    """
    return _Coarse.apply(x, name, bits, parameter)  # type: ignore[no-any-return]


class _Coarse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, bits: int, parameter: float) -> Tensor:
        ctx.name, ctx.bits, ctx.parameter, ctx.size = name, bits, parameter, x.shape[-1]
        ctx.save_for_backward(_packed(_levels(x, name, bits, parameter), bits))
        return NONLINEARITIES[name].function(x, parameter)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (code,) = ctx.saved_tensors
        levels = _unpacked(code, ctx.bits, ctx.size)
        return dy * _values(levels, ctx.name, ctx.bits, ctx.parameter, dy.dtype), None, None, None


def _levels(x: Tensor, name: str, bits: int, parameter: float) -> Tensor:
    """f'(x) as whole numbers below 2^bits."""
    found = NONLINEARITIES[name]
    if bits == 1 and found.slopes is None:
        return (x > 0).to(torch.uint8)
    slope = found.derivative(torch.ones_like(x), x, parameter)
    if bits == 1:
        assert found.slopes is not None
        return (slope == found.slopes(parameter)[1]).to(torch.uint8)
    return (slope.to(torch.float32) * found.unit + found.zero).round().clamp(0, 15).to(torch.uint8)


def _values(levels: Tensor, name: str, bits: int, parameter: float, dtype: torch.dtype) -> Tensor:
    found = NONLINEARITIES[name]
    if bits == 1:
        low, high = found.slopes(parameter) if found.slopes is not None else (0.0, 1.0)
        ends = (torch.full((), value, dtype=dtype, device=levels.device) for value in (high, low))
        return torch.where(levels > 0, *ends)
    return ((levels.to(torch.promote_types(dtype, torch.float32)) - found.zero) / found.unit).to(dtype)


def _packed(levels: Tensor, bits: int) -> Tensor:
    """Whole numbers (..., n) below 2^bits as bytes (..., ceil(n bits / 8)), the first in the lowest bits."""
    count = 8 // bits
    rest = -levels.shape[-1] % count
    levels = levels if isinstance(rest, int) and rest == 0 else F.pad(levels, (0, rest))
    found = levels[..., 0::count]
    for number in range(1, count):
        found = found | (levels[..., number::count] << (bits * number))
    return found


def _unpacked(code: Tensor, bits: int, n: Any) -> Tensor:
    count = 8 // bits
    at = torch.arange(n, device=code.device)
    return (code.index_select(-1, at // count) >> ((at % count) * bits).to(torch.uint8)) & ((1 << bits) - 1)
