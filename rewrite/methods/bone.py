"""Bone: a weight changed block by block, each by its product with a shared block and by that block itself."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Base, Form
from rewrite.codegen.forms.blocks import padded
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Bone(Method):
    """W_ij + W_ij D_i + D_i over r x r blocks  (Kang 2024; `bat` in HF PEFT's MiSS)"""

    r: int = arg(64, above=0, help="size of a block; what does not divide is padded")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2409.15371"

    def params(self, site: Site) -> dict[str, Param]:
        return {"D": Param((*site.leading, -(-site.out_features // self.r), self.r, self.r))}

    def weight(self, W: Base, D: Tensor) -> Form | Tensor:
        rows, columns = W.shape[-2:]
        whole = padded(padded(W.materialise().to(D.dtype), -1, self.r), -2, self.r)
        blocks = whole.unflatten(-1, (-1, self.r)).unflatten(-3, (-1, self.r)).transpose(-3, -2)  # (..., i, j, r, r)
        update = (blocks @ D[..., :, None, :, :] + D[..., :, None, :, :]).transpose(-3, -2)
        return W.materialise() + update.flatten(-2).flatten(-3, -2)[..., :rows, :columns]
