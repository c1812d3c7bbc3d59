"""Are all forms of a trained model one function?  Compares logits on held-out text and says what is allowed.

The allowed difference is relative to the largest logit and follows from rounding alone: float32 models are
compared with what a few hundred roundings add up to, half precision ones with what a few do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

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


def allowed(logits: torch.Tensor) -> float:
    """The difference that rounding may make between two orders of the same computation."""
    return _ALLOWED[logits.dtype]


def compare(name: str, found: torch.Tensor, wanted: torch.Tensor) -> Check:
    """The check that `found` equals `wanted`, both logits (batch, length, vocabulary)."""
    return Check(name, difference(found, wanted), allowed(wanted))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest |found - wanted|, relative to the largest |wanted|."""
    exact = wanted.double()
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


@torch.no_grad()
def logits(model: nn.Module, rows: torch.Tensor, *, compiled: bool) -> torch.Tensor:
    """The logits of a batch in evaluation mode, through the compiled call of the model or past it."""
    model.eval()
    rows = rows.to(next(model.parameters()).device)
    # The labels are there so that this is a graph that evaluation has compiled already.
    return (model if compiled else model.forward)(input_ids=rows, labels=rows).logits


def listed(checks: list[Check], moved: float) -> str:
    """The checks as a table; `moved` is how far the adapter moved the logits, for scale."""
    rows = [("the same logits", "largest difference", "allowed", "")]
    rows += [(c.name, f"{c.difference:.1e}", f"{c.allowed:.0e}", "ok" if c.holds else "FAILED") for c in checks]
    scale = f"relative to the largest logit; for scale, the adapter itself moves logits by {moved:.1e}"
    return "\n".join([*table(rows, right={1, 2}), scale])
