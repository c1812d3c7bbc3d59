"""SHiRA: a few entries of the weight are trained, as a sparse update that is switched fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rewrite.codegen.forms import Coordinates, Form, scattered
from rewrite.method import Method, Param, Tensor, arg
from rewrite.places import largest
from rewrite.sites import Site

if TYPE_CHECKING:
    from rewrite.runtime.calibration import Seen


@dataclass(frozen=True)
class Shira(Method):
    """W + S, S zero but for v at r (d_in + d_out) places `at`  (Bhardwaj et al. 2024)

    The places are random, or where |W|, the gradient |G| or |W G| (`snip`) is largest.  The gradient is that of the
    batches of `rewrite.calibrate`; until then |W| decides.
    """

    r: int = arg(32, low=1, help="as many numbers as a low-rank update of this rank; all, where the weight has fewer")
    mask: str = arg("random", choices=("random", "weight", "gradient", "snip"), help="what chooses the places")
    seed: int | None = arg(None, low=0, help="of random places; none is that of an unseeded generator")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2406.13175"

    @property
    def calibration(self) -> Literal["gradients"] | None:  # type: ignore[override]
        return "gradients" if self.mask in ("gradient", "snip") else None

    def fits(self, site: Site) -> str | None:
        if self.calibration and site.kind != "linear":
            return f"mask={self.mask} looks at the inputs of linear layers"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        d_out, d_in = site.out_features, site.in_features
        count = min(self.r * (d_out + d_in), d_out * d_in)

        def place(at: Tensor) -> None:  # row by row, as HF PEFT numbers the entries of a mask
            drawn = scattered(count, d_out, d_in, self.seed)
            at.copy_(drawn[:, (drawn[0] * d_in + drawn[1]).argsort()])

        return {
            "v": Param((*site.leading, count)),
            "at": Param((2, count), place, trainable=False, dtype=torch.int32),
        }

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        if self.mask != "random":
            theta["at"].copy_(largest(W.abs(), theta["at"].shape[1]))

    def calibrated(self, W: Tensor, theta: dict[str, Tensor], seen: Seen) -> None:
        assert seen.gradient is not None
        scores = seen.gradient * W if self.mask == "snip" else seen.gradient
        theta["at"].copy_(largest(scores.abs(), theta["at"].shape[1]))
        theta["v"].zero_()

    def delta(self, v: Tensor, at: Tensor, shape: tuple[int, int]) -> Form:
        return Coordinates(v, at.select(0, 0), at.select(0, 1), *shape)
