"""NF4 weights on a GPU: decoded in one kernel, the scales of double quantisation among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rewrite.codegen.kernels.kernel import Config, Kernel, triton_type
from rewrite.codegen.kernels.target import Target


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
        return None

    def arguments(self) -> Mapping[str, str]:
        scales = {"absmax": "*u8", "nested_absmax": "*fp32", "nested_code": "*fp32", "offset": "*fp32"}
        scales = scales if self.nested else {"absmax": "*fp32"}
        return {"codes": "*u8", **scales, "code": "*fp32", "out": f"*{triton_type(self.dtype)}"}

    def space(self, target: Target) -> Sequence[Config]:
        return [Config.of(warps=4, BLOCK=1024), Config.of(warps=8, BLOCK=2048)]

    def grid(self, config: Config, **sizes: int) -> tuple[int, ...]:
        return (-(-((self.numel + 1) // 2) // config["BLOCK"]),)


EXAMPLES = (
    Nf4Dequantise(4096 * 4096, 64, True, torch.bfloat16),
    Nf4Dequantise(4096 * 4096, 64, False, torch.float16),
)
