"""Is a contender right?  Relative errors of what it computes against the formulas in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from harness import error
from layers import Batch, Found, Problem, reference
from peers import Contender

Tensor = torch.Tensor


def compute(contender: Contender, batch: Batch) -> Found:
    """One step, with all that it computes."""
    ys = list(contender.call(*batch.xs))
    gradients = torch.autograd.grad(ys, [*batch.xs, *contender.trained.values()], batch.dys)
    trained = dict(zip(contender.trained, gradients[len(batch.xs) :], strict=True))
    return Found([y.detach() for y in ys], list(gradients[: len(batch.xs)]), trained)


def errors(found: Found, expected: Found, layers: Sequence[int] | None = None) -> dict[str, float]:
    """Relative errors by what they are of: y, dx, dA, dB, ...; of some layers alone where they are given."""
    take = range(len(expected.ys)) if layers is None else layers
    result = {"y": error([found.ys[i] for i in take], [expected.ys[i] for i in take])}
    if layers is None:
        result["dx"] = error(found.dxs, expected.dxs)
    for name in dict.fromkeys(name for i, name in expected.gradients if i in take):
        keys = [key for key in expected.gradients if key[1] == name and key[0] in take]
        result[f"d{name}"] = error([found.gradients[k] for k in keys], [expected.gradients[k] for k in keys])
    return result


def check(contender: Contender, problem: Problem) -> dict[str, float]:
    """Errors against float64, on the weights that the contender multiplies with."""
    batch = problem.batches[0]
    if problem.case.dropout and contender.trained:
        return check_dropout(contender, problem, batch)
    theta = {key: problem.theta[key] for key in contender.trained}
    expected = reference(problem, contender.weights(), batch, theta, columns=contender.columns)
    return errors(compute(contender, batch), expected)


def check_dropout(contender: Contender, problem: Problem, batch: Batch) -> dict[str, float]:
    """Errors with the masks that the contender drew, layer by layer.

    With the base weights at zero and one branch at a time, dx is zero exactly where an input was dropped: the forward
    pass and every gradient must have used that mask, and it must drop as often as it should.
    """
    case, worst = problem.case, dict[str, float]()
    weights = contender.weights()
    zero = [torch.zeros_like(W) for W in weights]
    for i, place in enumerate(case.places):
        theta = {k: v if k[0] == i or k[1] != "B" else torch.zeros_like(v) for k, v in problem.theta.items()}
        with (
            _replaced(weights, zero),
            _replaced(list(contender.trained.values()), [theta[k] for k in contender.trained]),
        ):
            found = compute(contender, batch)
        kept = found.dxs[place.feed] != 0
        rate, count = 1 - float(kept.double().mean()), kept.numel()
        if abs(rate - case.dropout) > 6 * (case.dropout / count) ** 0.5:
            raise ArithmeticError(f"{place.name}: dropped {rate:.2%} of {count:,}, asked for {case.dropout:.2%}")
        masks = [kept.double() / (1 - case.dropout) if j == i else None for j in range(len(zero))]
        expected = reference(problem, zero, batch, theta, masks)
        own = errors(found, expected, [i])
        own["dx"] = error([found.dxs[place.feed]], [expected.dxs[place.feed]])
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in own.items()}
    return worst


@contextlib.contextmanager
def _replaced(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for t, value in zip(tensors, values, strict=True):
            t.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, before, strict=True):
                t.copy_(value)
