"""NF4 weights on a GPU: decoded in one kernel, the scales of double quantisation among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewrite.codegen import nf4
from rewrite.codegen.kernels import plans
from rewrite.codegen.kernels.kernel import Config, Kernel, triton_type
from rewrite.codegen.kernels.target import Target, unusable


@dataclass(frozen=True)
class Nf4Dequantise(Kernel):
    """w[i] = CODE[codes[i]] * absmax[i // blocksize], the absmax themselves decoded where they are nested

    One rounding to `dtype` after a float32 product; bit for bit `codegen.nf4.dequantize`.
    """

    numel: int
    blocksize: int
    nested: bool
    dtype: torch.dtype

    name = "nf4_dequantise"
    applies = "every NF4 weight that a product needs whole"
    cpu = "C++, codegen/cpu"
    fp_fusion = False  # nested scales: a product and a sum, rounded one after the other

    def supports(self) -> str | None:
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"weights of {str(self.dtype).removeprefix('torch.')}"
        return None

    def arguments(self) -> Mapping[str, str]:
        return {**stored_types(self.nested), "out": f"*{triton_type(self.dtype)}"}

    def names(self) -> dict[str, Any]:
        return {**super().names(), "code": nf4.CODE}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=4, GROUPS=512), Config.of(warps=4, GROUPS=1024), Config.of(warps=8, GROUPS=512)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-self.numel // (8 * config["GROUPS"])),)


def stored_types(nested: bool) -> dict[str, str]:
    """The arguments that are the stored tensors of a weight."""
    scales = {"absmax": "*u8", "nested_absmax": "*fp32", "nested_code": "*fp32", "offset_at": "*fp32"}
    return {"codes": "*u8", **(scales if nested else {"absmax": "*fp32"})}


@plans.by_layout
def unreadable(stored: Sequence[Tensor], numel: int, blocksize: int) -> str | None:
    """Why kernels do not read the stored tensors of so many weights, or None."""
    if reason := unusable(stored[0].device):
        return reason
    blocks = -(-numel // blocksize)
    sizes = [(numel + 1) // 2, blocks, *((-(-blocks // nf4.NESTED_BLOCKSIZE), 256, 1) if len(stored) > 2 else ())]
    types = stored_types(len(stored) > 2).values()
    for tensor, size, of in zip(stored, sizes, types, strict=True):
        if f"*{triton_type(tensor.dtype)}" != of or tensor.numel() != size:
            return f"NF4 tensors of another dtype or size: {list(tensor.shape)} of {tensor.dtype}"
        if tensor.device != stored[0].device or not tensor.is_contiguous():
            return "NF4 tensors on several devices, or not contiguous"
    return None


def dequantise(stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, blocksize: int) -> Tensor:
    """The weight behind `codes, absmax` or `codes, absmax, nested absmax, nested code, offset`, by one kernel."""
    out = torch.empty(shape, dtype=dtype, device=stored[0].device)
    _kernel(out.numel(), blocksize, len(stored) > 2, dtype).launch(*stored, out)
    return out


@plans.kept
def _kernel(numel: int, blocksize: int, nested: bool, dtype: torch.dtype) -> Nf4Dequantise:
    return Nf4Dequantise(numel, blocksize, nested, dtype)


def decoded(stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, blocksize: int) -> Tensor | None:
    """The weight by the kernel; None where it does not serve: traced, not on a GPU, not what the kernel reads."""
    if torch.compiler.is_compiling() or not all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cuda for t in stored):
        return None
    numel = math.prod(shape)
    if _kernel(numel, blocksize, len(stored) > 2, dtype).supports() or unreadable(stored, numel, blocksize):
        return None
    return dequantise(stored, shape, dtype, blocksize)


EXAMPLES = (
    Nf4Dequantise(4096 * 4096, 64, True, torch.bfloat16),
    Nf4Dequantise(4096 * 4096, 64, False, torch.float16),
)
