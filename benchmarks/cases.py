"""One case measured: every contender built, checked against float64, timed interleaved, its memory counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import OURS, Gate, Plan, Step, error, measure, memory, ratios, release, replayed, said, saved_bytes, spread
from layers import BOUNDS, SCALE, Batch, Case, Found, Problem, reference
from peers import Contender, for_method

Tensor = torch.Tensor


@dataclass
class Row:
    """What is known of a contender in a case; `failure` is its error, where it has one."""

    failure: str = ""
    check: dict[str, float] = field(default_factory=dict)
    passed: bool | None = None
    first_seconds: float = 0.0  # of the first step, with all that is compiled for it
    saved_bytes: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # of one way to time it

    def described(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if value not in ("", {}, None)}
        return {**found, "memory": self.memory} if self.memory else found


def stepper(contender: Contender, batches: Sequence[Batch]) -> Step:
    """Forward and backward, to the inputs and to what is trained; the inputs take turns."""
    trained = list(contender.trained.values())

    def step(k: int) -> Sequence[Tensor]:
        xs, dys = batches[k % len(batches)]
        return torch.autograd.grad(list(contender.call(*xs)), [*xs, *trained], dys)

    return step


def forwarder(contender: Contender, batches: Sequence[Batch]) -> Step:
    """Inference."""

    def forward(k: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return contender.call(*batches[k % len(batches)].xs)

    return forward


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


def prepare(case: Case, problem: Problem, names: Sequence[str], rows: dict[str, Row]) -> dict[str, Contender]:
    """Build, run once and check every contender; what fails is left out and says why."""
    builders, found = for_method(case), dict[str, Contender]()
    for name in names:
        row = rows[name] = Row()
        try:
            begin = time.perf_counter()
            contender = builders[name](problem)
            torch.manual_seed(0)
            stepper(contender, problem.batches)(0)
            row.first_seconds = time.perf_counter() - begin
            row.check = check(contender, problem)
            row.passed = max(row.check.values()) <= BOUNDS[case.dtype]
            xs = problem.batches[0].xs
            row.saved_bytes = saved_bytes(lambda c=contender, xs=xs: c.call(*xs), contender.known)
            found[name] = contender
        except Exception as failure:  # a peer may fail in any way: it is named, not absent
            row.failure = said(failure)
    return found


def timed(
    contenders: Mapping[str, Contender], problem: Problem, what: str, plan: Plan, rows: dict[str, Row]
) -> dict[str, list[float]]:
    """Times of the contenders in one way: `step`, `forward`, or `replay` of a step as a CUDA graph."""
    device, steps = problem.case.device, dict[str, Step]()
    for name, contender in contenders.items():
        step = (forwarder if what == "forward" else stepper)(contender, problem.batches)
        try:
            if what == "replay":
                if name.endswith("graphs"):
                    continue
                step = replayed(step, device)
            step(0)
            steps[name] = step
        except Exception as failure:  # no capture, no inference: said, and the others go on
            rows[name].failures[what] = said(failure)
    times = measure(steps, device, plan)
    for name, values in times.items():
        rows[name].times[what] = spread(values)
    return times


def run(case: Case, names: Sequence[str], ways: Sequence[str], plan: Plan, gate: Gate) -> dict[str, Any]:
    """Everything about a case, for a result."""
    rows, compared = dict[str, Row](), dict[str, Any]()
    with gate.preparing():
        problem = Problem(case)
        contenders = prepare(case, problem, names, rows)
        for name, contender in contenders.items():
            with contextlib.suppress(NotImplementedError):
                step, xs = stepper(contender, problem.batches), problem.batches[0].xs
                rows[name].memory = memory(step, lambda c=contender, xs=xs: c.call(*xs), case.device)
    with gate.measuring():
        for what in ways:
            times = timed(contenders, problem, what, plan, rows)
            base = "base, compiled" if "base, compiled" in times else "base"
            compared[what] = {"over ours": ratios(times, OURS), "over the base": ratios(times, base)}
    found = {"case": case.described(), "bound": BOUNDS[case.dtype], "scale": SCALE}
    found |= {"rows": {name: row.described() for name, row in rows.items()}, "ratios": compared}
    del contenders, problem
    release(case.device)
    return found
