"""The knapsack of tensors against every subset, on small instances."""

from __future__ import annotations

import itertools
import random

import pytest

from rewrite.knapsack import best


def spent(chosen: tuple[int, ...] | list[int], costs: list[int], chain: list[int]) -> int:
    return sum(costs[n] for n in chosen) + sum(chain[: max(chosen) + 1] if chosen else [])


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_best_of_all_subsets(seed: int):
    numbers = random.Random(seed)
    count = numbers.randint(1, 9)
    values = [round(numbers.uniform(-0.3, 1.0), 3) for _ in range(count)]
    costs, chain = ([numbers.choice([0, 1, 2, 3, 5, 8]) for _ in range(count)] for _ in range(2))
    budget = numbers.randint(1, 30)
    # In as many levels as there are units, nothing is rounded.
    chosen = best(values, costs, chain, budget, levels=budget)
    subsets = [s for n in range(count + 1) for s in itertools.combinations(range(count), n)]
    allowed = [s for s in subsets if spent(s, costs, chain) <= budget]
    assert spent(chosen, costs, chain) <= budget
    assert sum(values[n] for n in chosen) == pytest.approx(max(sum(values[n] for n in s) for s in allowed))


def test_rounding_keeps_the_budget():
    for seed in range(20):
        numbers = random.Random(seed)
        costs, chain = ([numbers.randint(10**9, 10**12) for _ in range(40)] for _ in range(2))
        values, budget = [numbers.random() for _ in range(40)], 0.4 * (sum(costs) + sum(chain))
        chosen = best(values, costs, chain, budget)
        assert 0.9 * budget < spent(chosen, costs, chain) <= budget


def test_all_of_it_fits_all_of_the_budget():
    costs, chain = [3, 0, 7, 1], [0, 5, 2, 2]
    assert best([1.0, 0.5, 0.1, 0.2], costs, chain, float(sum(costs) + sum(chain))) == [0, 1, 2, 3]
    assert best([-1.0, -2.0], [1, 1], [1, 1], 10) == []
