"""Which tensors to train for a number of floating-point operations: a knapsack in which depth costs too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEVELS = 10_000


def best(
    values: Sequence[float], costs: Sequence[int], chain: Sequence[int], budget: float, levels: int = LEVELS
) -> list[int]:
    """The items of the largest total value whose costs, and the chain down to the last of them, are within `budget`.

    Items stand in the order of the chain: to reach number k, `chain[0] + ... + chain[k]` is to be paid, once, whatever
    is taken on the way.  Costs are rounded up to one in `levels` of the budget, so that it holds.  Dynamic programming
    over (item, cost), in `levels` steps for each item.

    >>> best([1.0, 5.0, 3.0], costs=[1, 4, 4], chain=[1, 1, 1], budget=7)
    [1]
    """
    unit, reached, found = budget / levels, 0, (0.0, -1, 0)
    total = torch.zeros(levels + 1, dtype=torch.float64)  # the best value for every cost
    taken = torch.zeros(len(values), levels + 1, dtype=torch.bool)
    sizes = [_rounded(cost, unit) for cost in costs]
    for n, (value, size) in enumerate(zip(values, sizes, strict=True)):
        if value > 0 and size <= levels:
            other = total[: levels + 1 - size] + value
            taken[n, size:] = other > total[size:]
            total[size:] = torch.maximum(total[size:], other)
        reached += chain[n]
        left = levels - _rounded(reached, unit)
        if left >= 0 and (here := float(total[left])) > found[0]:
            found = here, n, left
    chosen, room = list[int](), found[2]
    for n in range(found[1], -1, -1):
        if taken[n, room]:
            chosen.append(n)
            room -= sizes[n]
    return chosen[::-1]


def _rounded(cost: int, unit: float) -> int:
    """A cost in units, upwards; a last digit that is rounding does not count."""
    return -int(-cost / unit * (1 - 1e-12) // 1) if cost else 0
