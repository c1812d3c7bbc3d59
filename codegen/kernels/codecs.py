"""Codecs of saved activations on a GPU: one kernel each way, bit for bit `codegen.codecs`.

They are for eager models, whose hooks encode one tensor at a time.  Compiled graphs hold the reference instead:
Inductor puts it into the kernel that computes a value, and decodes in the kernel that reads it, which saves a read and
a write of that value that no opaque kernel could.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.codegen.kernels.kernel import Config, Kernel, triton_type
from rewrite.codegen.kernels.target import Target, unusable

Tensor = torch.Tensor
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_VALUES = 2048  # of a program


@dataclass(frozen=True)
class _Codec(Kernel):
    codec: str
    group: int
    n: int
    """Values of a row, the last dimension; its last group may be shorter."""
    dtype: torch.dtype

    cpu = "PyTorch, operator by operator"

    @property
    def per_row(self) -> int:
        return -(-self.n // self.group)

    def names(self) -> dict[str, Any]:
        lanes = 1 << (self.group - 1).bit_length()
        return {**super().names(), "per_row": self.per_row, "lanes": lanes}

    def supports(self) -> str | None:
        if self.codec not in ("fp8", "int8"):
            return f"no kernel for the codec {self.codec}"
        if self.dtype not in _FLOATS:
            return f"no kernel for {self.dtype}"
        return None if self.group <= _VALUES else f"groups of {self.group} are longer than {_VALUES}"

    def stored(self) -> dict[str, str]:
        """The arguments that hold codes and scales."""
        wide = "*fp32" if self.dtype.itemsize > 2 else "*bf16"
        return {"codes": "*u8", "scales": "*u8"} if self.codec == "fp8" else {"codes": "*i8", "scales": wide}

    def space(self, target: Target) -> Sequence[Config]:
        lanes = 1 << (self.group - 1).bit_length()
        return [Config.of(warps=4, GROUPS=_VALUES // lanes), Config.of(warps=8, GROUPS=2 * _VALUES // lanes)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-sizes["groups"] // config["GROUPS"]),)


@dataclass(frozen=True)
class ActivationEncode(_Codec):
    """codes, scales: x as codes of 8 bits, a scale for each group of the last dimension"""

    name = "activation_encode"
    applies = "saved activations of eager models; Inductor fuses those of compiled ones"

    def arguments(self) -> Mapping[str, str]:
        return {"x": f"*{triton_type(self.dtype)}", **self.stored(), "groups": "i32"}


@dataclass(frozen=True)
class ActivationDecode(_Codec):
    """out: the values of codes of 8 bits, times the scale of their group"""

    name = "activation_decode"
    applies = "saved activations of eager models, in the backward pass"

    def arguments(self) -> Mapping[str, str]:
        return {**self.stored(), "out": f"*{triton_type(self.dtype)}", "groups": "i32"}


def supports(codec: str, group: int, n: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there is no kernel for tensors (..., n) of a dtype, or None."""
    return unusable(device) or ActivationEncode(codec, min(group, max(n, 1)), n, dtype).supports()


def encode(x: Tensor, codec: str, group: int, codes: Tensor, scales: Tensor) -> None:
    """Write the codes and scales of x (..., n)."""
    if x.numel():
        kernel = ActivationEncode(codec, min(group, x.shape[-1]), x.shape[-1], x.dtype)
        kernel.launch(x.contiguous(), _bytes(codes), scales, groups=scales.numel())


def decode(codes: Tensor, scales: Tensor, codec: str, group: int, out: Tensor) -> None:
    """Write the values (..., n) of codes and scales."""
    if out.numel():
        kernel = ActivationDecode(codec, min(group, out.shape[-1]), out.shape[-1], out.dtype)
        kernel.launch(_bytes(codes.contiguous()), scales.contiguous(), out, groups=scales.numel())


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


EXAMPLES = tuple(
    kind(codec, 128, 4096, dtype)
    for kind in (ActivationEncode, ActivationDecode)
    for codec, dtype in (("fp8", torch.bfloat16), ("int8", torch.bfloat16), ("int8", torch.float32))
)
