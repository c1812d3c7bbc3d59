"""LoRA-FA: LoRA whose A is frozen where it starts, so that no input has to be kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rewrite.method import Param, kaiming
from rewrite.methods.lora import Lora
from rewrite.sites import Site


@dataclass(frozen=True)
class LoraFa(Lora):
    """y + s (B A x + c) with A frozen; no projection of gradients, as HF PEFT's optimizer does  (Zhang et al. 2023)"""

    paper = "https://arxiv.org/abs/2308.03303"

    def params(self, site: Site) -> dict[str, Param]:
        theta = super().params(site)
        A, B = theta["A"], theta["B"]
        return theta | {
            "A": replace(A, init=kaiming, trainable=False),
            "B": replace(B, init=torch.nn.init.zeros_),
        }
