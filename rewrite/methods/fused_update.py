"""Fused update: the optimizer steps inside the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.regime import Regime


@dataclass(frozen=True)
class FusedUpdate(Regime):
    """theta_k  ->  step(theta_k, dL/dtheta_k) as soon as that is there, which is then freed  (Lin et al. 2022)

    The same as an ordinary step of the same optimizer, tensor by tensor, with one gradient in memory at a time.  Alone
    it trains the whole model.  `rewrite.optimizer` makes the optimizer.
    """

    gradient = "fused"
    paper = "https://arxiv.org/abs/2206.15472"
