"""How far a kernel may be from a float64 reference: the rounding of its output, and of sums in float32."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def assert_rounded(out: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """`out` is the sum `exact` (float64) rounded once to its dtype, of so many terms added up in float32.

    `magnitude`: the sum of the terms' absolute values, which is what the errors of float32 are relative to.
    """
    assert out.shape == exact.shape
    assert bool(out.isfinite().all())
    ulp = torch.finfo(out.dtype).eps / 2
    allowed = exact.abs() * ulp + magnitude * terms * torch.finfo(torch.float32).eps + torch.finfo(out.dtype).tiny
    excess = (out.double() - exact).abs() - allowed
    assert excess.numel() == 0 or excess.max() <= 0, f"{excess.max():.3e} beyond the bound"
