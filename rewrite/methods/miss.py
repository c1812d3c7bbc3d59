"""MiSS: one shard of a matrix, shared by all pieces of the input; and Bone, which multiplies the weight by it too."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.codegen.forms import Form, Tiled
from rewrite.codegen.forms.blocks import padded
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Miss(Method):
    """W + [D' D' ... D'], cut off at d_in; with bat, W_ij + W_ij D_i + D_i over r x r blocks  (Kang et al. 2024)"""

    r: int = arg(64, above=0, help="size of a piece of the input")
    mini: int | None = arg(None, above=0, help="outputs that D is for; it repeats over the others")
    bat: bool = arg(False, help="the block affine form of it, Bone")
    dropout: float = arg(0.0, low=0, below=1, help="probability of dropping an input of the branch in training")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2409.15371"

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        return "bat has a block for every r outputs: leave mini out" if self.bat and self.mini else None

    def params(self, site: Site) -> dict[str, Param]:
        if self.bat:
            return {"D": Param((*site.leading, -(-site.out_features // self.r), self.r, self.r))}
        return {"D": Param((*site.leading, self.r, self.mini or site.out_features))}

    def weight(self, W: Form, D: Tensor) -> Form | Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, columns = W.shape[-2:]  # type: ignore[attr-defined]
        if not self.bat:
            return W + Tiled(Tiled(D, rows).materialise().transpose(-2, -1), columns)
        whole = padded(padded(W.materialise().to(D.dtype), -1, self.r), -2, self.r)
        blocks = whole.unflatten(-1, (-1, self.r)).unflatten(-3, (-1, self.r))  # (..., i, r, j, r)
        blocks = blocks.transpose(-3, -2)
        update = (blocks @ D[..., :, None, :, :] + D[..., :, None, :, :]).transpose(-3, -2)
        return W.materialise() + update.flatten(-2).flatten(-3, -2)[..., :rows, :columns]
