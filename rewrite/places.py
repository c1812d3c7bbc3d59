"""Which entries of a matrix are adapted: by a score of every entry, or of its rows and columns."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
EXACT = 512
"""Up to this size of a matrix its singular values are all computed."""


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest entries of a matrix of scores, as (rows, columns), (2, count), row by row.

    Scores of a stack of matrices that share their entries are added up.

    >>> largest(torch.tensor([[1.0, 5.0], [7.0, 2.0]]), 2)
    tensor([[0, 1],
            [1, 0]])
    """
    total = scores.flatten(0, -3).sum(0) if scores.ndim > 2 else scores
    return coordinates(total.flatten().topk(count).indices.sort().values, total.shape[-1])


def coordinates(flat: Tensor, columns: int) -> Tensor:
    """Numbers of entries, counted row by row, as (rows, columns)."""
    return torch.stack([flat // columns, flat % columns])


def flat(at: Tensor, columns: int) -> Tensor:
    """The inverse of `coordinates`."""
    return at[0].to(torch.int64) * columns + at[1].to(torch.int64)


def low_rank(W: Tensor, rank: int) -> Tensor:
    """The best approximation of a matrix by one of that rank; of a large matrix to the accuracy of a randomised SVD."""
    limit = min(W.shape)
    if rank >= limit:
        return W
    if limit <= max(EXACT, 4 * rank):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]
    with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, q=2 * rank, niter=2)
    return (U[:, :rank] * S[:rank]) @ V[:, :rank].t()
