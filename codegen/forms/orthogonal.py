"""Orthogonal matrices out of free numbers: skew-symmetric matrices and their Cayley transforms.

These are functions of tensors; the forms that hold what they return are `BlockDiagonal` and `Butterfly`.
"""

from __future__ import annotations

from typing import Any

import torch


def skew(entries: Any, size: int) -> Any:
    """The skew-symmetric matrices with these entries above the diagonal, row by row.

    entries (..., size (size - 1) / 2) -> (..., size, size).

    >>> skew(torch.tensor([1.0, 2.0, 3.0]), 3)
    tensor([[ 0.,  1.,  2.],
            [-1.,  0.,  3.],
            [-2., -3.,  0.]])
    """
    # In operators of `entries` alone: an index made here would be a constant of the graph.
    above = entries.new_ones((size, size), dtype=torch.int64).triu(1)
    number = (above.flatten().cumsum(0) - 1).clamp(min=0)
    upper = entries.index_select(-1, number).unflatten(-1, (size, size)) * above
    return upper - upper.transpose(-2, -1)


def cayley(Q: Any) -> Any:
    """(I - Q) (I + Q)^-1, orthogonal for skew-symmetric Q (..., n, n); in float32 or wider (Cayley 1846).

    >>> R = cayley(skew(torch.tensor([0.5]), 2))
    >>> torch.allclose(R @ R.T, torch.eye(2), atol=1e-6)
    True
    """
    one = identity(Q)
    return torch.linalg.solve(one + Q, one - Q, left=False)


def cayley_neumann(Q: Any, terms: int) -> Any:
    """(I + Q) (I - Q)^-1 by its Neumann series I + 2 Q + 2 Q^2 + ..., whose last power counts once (Qiu et al. 2025).

    Nearly orthogonal for small Q (..., n, n), and the transpose of what `cayley` makes of the same Q.  `terms` are
    counted as HF PEFT does: 2 stops at 2 Q, 3 and 4 at Q^3, 5 at Q^4.

    >>> bool((cayley_neumann(torch.zeros(2, 2), 5) == torch.eye(2)).all())
    True
    """
    R = identity(Q) + 2 * Q
    if terms < 3:
        return R
    power = Q @ Q
    R = R + 2 * power
    for _ in range(3, terms - 1):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


def identity(like: Any) -> Any:
    """The identity of the size of `like` (..., n, n), as one matrix (n, n)."""
    return torch.diag_embed(like.new_ones(like.shape[-1]))
