"""FourierFT: an update whose Fourier spectrum has a few trained entries at random places."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.codegen.forms import Coordinates, Form, Fourier, scattered
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Fourierft(Method):
    """W + scale Re(ifft2(S)), S zero but for c at the places `at`  (Gao et al. 2024); HF PEFT starts c at random."""

    n: int = arg(1000, low=1, help="number of frequencies; all, where the weight has fewer")
    scale: float = arg(150.0, above=0, help="factor of the update")
    seed: int = arg(777, low=0, help="of the places, which are the same in all layers of a shape")

    kinds = frozenset({"linear", "conv", "embedding", "expert"})
    paper = "https://arxiv.org/abs/2405.03003"

    def params(self, site: Site) -> dict[str, Param]:
        d_out, d_in = site.out_features, site.in_features
        count = min(self.n, d_out * d_in)
        at = Param(
            (2, count), lambda t: t.copy_(scattered(count, d_out, d_in, self.seed)), trainable=False, dtype=torch.int32
        )
        return {"c": Param((*site.leading, count)), "at": at}

    def delta(self, c: Tensor, at: Tensor, shape: tuple[int, int]) -> Form:
        return Fourier(Coordinates(c, at.select(0, 0), at.select(0, 1), *shape)) * self.scale
