"""What models do to logits between head and loss: casts, scales and soft caps, as data that a fused operator takes.

A chain is written `div:30.0,tanh,mul:30.0,to:float32`, in the order and the dtypes in which the model computes it, so
that it rounds where the model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Step:
    """One elementwise operation: `mul` or `div` by a number, `tanh`, or a cast `to` a dtype."""

    name: str
    value: float | torch.dtype | None = None

    def __str__(self) -> str:
        value = str(self.value).removeprefix("torch.")
        return self.name if self.value is None else f"{self.name}:{value}"

    @classmethod
    def parse(cls, text: str) -> Step:
        name, _, value = text.partition(":")
        return cls(name, getattr(torch, value) if name == "to" else float(value) if value else None)


@dataclass(frozen=True)
class Chain:
    """Elementwise steps one after the other, with their derivative.

    >>> chain = Chain.parse("div:2.0,to:float64")
    >>> chain.forward(torch.tensor([3.0]))[0]
    tensor([1.5000], dtype=torch.float64)
    """

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    @classmethod
    def parse(cls, text: str) -> Chain:
        return cls(tuple(Step.parse(part) for part in text.split(",") if part))

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the result for an input of `dtype`."""
        casts = [s.value for s in self.steps if isinstance(s.value, torch.dtype)]
        return casts[-1] if casts else dtype

    def without_widening(self, dtype: torch.dtype) -> Chain:
        """The chain less casts at its end that lose nothing, for a reader that widens by itself."""
        shorter = Chain(self.steps[:-1])
        source, target = shorter.dtype(dtype), self.dtype(dtype)
        if self.steps and self.steps[-1].name == "to" and torch.promote_types(source, target) == target:
            return shorter.without_widening(dtype)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The result, and what `backward` needs: the outputs of `tanh`."""
        kept: list[Tensor] = []
        for step in self.steps:
            match step.value:
                case None:
                    x = x.tanh()
                    kept.append(x)
                case float() as number:
                    x = x * number if step.name == "mul" else x / number
                case dtype:
                    x = x.to(dtype)
        return x, kept

    def backward(self, slope: Tensor, kept: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The gradient of an input of `dtype` from that of the result."""
        kept = list(kept)
        for at in reversed(range(len(self.steps))):
            match self.steps[at].value:
                case None:
                    slope = torch.ops.aten.tanh_backward(slope, kept.pop())
                case float() as number:
                    slope = slope * number if self.steps[at].name == "mul" else slope / number
                case _:
                    slope = slope.to(Chain(self.steps[:at]).dtype(dtype))
        return slope
