"""Random sets of blocks, of few different kinds: a compiled graph belongs to one set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch


def pool(count: int, size: int, sets: int | None, generator: torch.Generator) -> list[tuple[int, ...]] | None:
    """At most `sets` sets of `size` of `count` things, in which all things appear equally often; all sets if they fit.

    They are cut out of random orders.  None where `sets` is None: every set may be drawn.

    >>> pool(3, 2, 8, torch.Generator())
    [(0, 1), (0, 2), (1, 2)]
    >>> sorted(sum(pool(6, 2, 3, torch.Generator().manual_seed(1)), ()))
    [0, 1, 2, 3, 4, 5]
    """
    if sets is None:
        return None
    if math.comb(count, size) <= sets:
        return list(itertools.combinations(range(count), size))
    found: dict[tuple[int, ...], None] = {}
    order: list[int] = []
    while len(found) < sets:
        while len(order) < size:  # a set may lie across two orders, but has no thing twice
            order += [n for n in torch.randperm(count, generator=generator).tolist() if n not in order]
        found[tuple(sorted(order[:size]))] = None
        order = order[size:]
    return list(found)


def draw(
    weights: Sequence[float] | torch.Tensor,
    size: int,
    choices: Sequence[tuple[int, ...]] | None,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """`size` things without replacement, with chances in proportion to `weights`; of `choices`, where there are some.

    By Gumbel's trick: the largest of log-weights with noise are such a draw, and the choice whose sum is largest is
    the one nearest to it.

    >>> draw([1.0, 0.0, 1.0], 2, None, torch.Generator().manual_seed(0))
    (0, 2)
    """
    chances = torch.as_tensor(weights, dtype=torch.float64)
    uniform = torch.rand(len(chances), generator=generator, dtype=torch.float64)
    keys = chances.log() - (-uniform.log()).log()
    if choices is None:
        return tuple(sorted(keys.topk(size).indices.tolist()))
    return max(choices, key=lambda chosen: float(keys[list(chosen)].sum()))
