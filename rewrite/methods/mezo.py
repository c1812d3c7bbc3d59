"""MeZO: no backward pass at all."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.method import arg
from rewrite.regime import Regime


@dataclass(frozen=True)
class Mezo(Regime):
    """g = mean over q of (L(theta + eps z) - L(theta - eps z)) / (2 eps) z,  z ~ N(0, 1)  (Malladi et al. 2023)

    Random numbers are made anew from seeds, in place: nothing is kept but the model.  Alone it trains all of it, beside
    adapters these: `lora(r=8)@attn.q,v + mezo(eps=1e-2)`.  `rewrite.optimizer` takes the step.  The model is in
    evaluation mode for the losses, and a direction is left by going back, so but for rounding to where it began.
    """

    eps: float = arg(1e-3, above=0, help="how far to go along a direction")
    q: int = arg(1, low=1, help="directions in a step")

    gradient = "zeroth"
    paper = "https://arxiv.org/abs/2305.17333"
