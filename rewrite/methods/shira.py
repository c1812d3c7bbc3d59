"""SHiRA: a few entries of the weight are trained, at random places, as a sparse update that is switched fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Coordinates, Form, scattered
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Shira(Method):
    """W + S, S zero but for v at r (d_in + d_out) random places `at`  (Bhardwaj et al. 2024); no mask but random."""

    r: int = arg(32, low=1, help="as many numbers as a low-rank update of this rank; all, where the weight has fewer")
    seed: int | None = arg(None, low=0, help="of the places; none is that of an unseeded generator")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2406.13175"

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

    def delta(self, v: Tensor, at: Tensor, shape: tuple[int, int]) -> Form:
        return Coordinates(v, at.select(0, 0), at.select(0, 1), *shape)
