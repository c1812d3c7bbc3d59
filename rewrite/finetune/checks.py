"""Are all forms of a trained model one function?  Compares logits on held-out text and says what is allowed.

The allowed difference is relative to the largest logit and follows from rounding alone: float32 models are
compared with what a few hundred roundings add up to, half precision ones with what a few do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rewrite.finetune.training import filled
from rewrite.table import table

_ALLOWED = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference of two models' logits, relative to the largest logit."""

    name: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed  # false for nan


def allowed(model: nn.Module) -> float:
    """The difference that rounding may make between two orders of a model's computation: by its coarsest dtype."""
    return max(_ALLOWED.get(p.dtype, 0.0) for p in model.parameters())


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest |found - wanted|, relative to the largest |wanted|."""
    exact = wanted.double()
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


@torch.no_grad()
def logits(model: nn.Module, rows: torch.Tensor, batch: int, *, compiled: bool) -> torch.Tensor:
    """The logits of at most two rows of text, in evaluation mode, through the model's compiled call or past it.

    They run in a batch of `batch` rows with labels: a graph that evaluation has compiled already.
    """
    model.eval()
    inputs = filled(rows.to(next(model.parameters()).device), batch)
    return (model if compiled else model.forward)(**inputs).logits[: min(2, len(rows))]


def listed(checks: list[Check], moved: float) -> str:
    """The checks as a table; `moved` is how far the adapter moved the logits, for scale."""
    rows = [("the same logits", "largest difference", "allowed", "")]
    rows += [(c.name, f"{c.difference:.1e}", f"{c.allowed:.0e}", "ok" if c.holds else "FAILED") for c in checks]
    scale = f"relative to the largest logit; for scale, the adapter itself moves logits by {moved:.1e}"
    return "\n".join([*table(rows, right={1, 2}), scale])
