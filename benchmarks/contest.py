"""One case measured: every contender built, checked against float64, timed interleaved, its memory counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from harness import OURS, Gate, Plan, Step, measure, memory, ratios, release, replayed, said, saved_bytes, spread
from layers import Batch
from peers import Contender

from rewrite.table import duration, size, table

Tensor = torch.Tensor


WAYS = ("step", "replay", "forward")
"""Forward and backward as they are called; the same as one replayed CUDA graph; inference."""


class Setting(Protocol):
    """What a case says of itself; printing it names it."""

    @property
    def device(self) -> torch.device: ...

    def described(self) -> dict[str, Any]: ...


class Numbers(Protocol):
    """The numbers that every contender of a case computes with."""

    batches: list[Batch]


@dataclass(frozen=True)
class Contest:
    """A case with who takes part, and what its numbers must be."""

    case: Setting
    problem: Callable[[], Any]
    builders: Mapping[str, Callable[[Any], Contender]]
    check: Callable[[Contender, Any], dict[str, float]]
    bound: float


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


def prepare(contest: Contest, problem: Numbers, names: Sequence[str], rows: dict[str, Row]) -> dict[str, Contender]:
    """Build, run once and check every contender; what fails is left out and says why."""
    found = dict[str, Contender]()
    for name in names:
        row = rows[name] = Row()
        try:
            begin = time.perf_counter()
            contender = contest.builders[name](problem)
            torch.manual_seed(0)
            step, xs = stepper(contender, problem.batches), problem.batches[0].xs
            step(0)
            row.first_seconds = time.perf_counter() - begin
            row.check = contest.check(contender, problem)
            row.passed = max(row.check.values()) <= contest.bound
            row.saved_bytes = saved_bytes(lambda c=contender, xs=xs: c.call(*xs), contender.known)
            row.memory = memory(step, lambda c=contender, xs=xs: c.call(*xs), contest.case.device)
            found[name] = contender
        except Exception as failure:  # a peer may fail in any way: it is named, not absent
            row.failure = said(failure)
    return found


def timed(
    contenders: Mapping[str, Contender],
    problem: Numbers,
    device: torch.device,
    what: str,
    plan: Plan,
    rows: dict[str, Row],
) -> dict[str, list[float]]:
    """Times of the contenders in one way: `step`, `forward`, or `replay` of a step as a CUDA graph."""
    steps = dict[str, Step]()
    for name, contender in contenders.items():
        if what == "replay" and name.endswith("graphs"):  # it is one already
            continue
        step = (forwarder if what == "forward" else stepper)(contender, problem.batches)
        try:
            step = replayed(step, device) if what == "replay" else step
            step(0)
            steps[name] = step
        except Exception as failure:  # no capture, no inference: said, and the others go on
            rows[name].failures[what] = said(failure)
    times = measure(steps, device, plan)
    for name, values in times.items():
        rows[name].times[what] = spread(values)
    return times


def run(contest: Contest, names: Sequence[str], ways: Sequence[str], plan: Plan, gate: Gate) -> dict[str, Any]:
    """Everything about a case, for a result."""
    case, rows, compared = contest.case, dict[str, Row](), dict[str, Any]()
    with gate.preparing():
        problem = contest.problem()
        contenders = prepare(contest, problem, names, rows)
    with gate.measuring():
        for what in ways:
            times = timed(contenders, problem, case.device, what, plan, rows)
            base = "base, compiled" if "base, compiled" in times else "base"
            compared[what] = {"over ours": ratios(times, OURS), "over the base": ratios(times, base)}
    found = {"case": case.described(), "bound": contest.bound, "ratios": compared}
    del contenders, problem
    release(case.device)
    return {**found, "rows": {name: row.described() for name, row in rows.items()}}


def lines(result: Mapping[str, Any]) -> list[str]:
    """A case as a table: time, ratio to ours with its quartiles, memory, largest error."""
    rows: list[tuple[str, ...]] = [("", "way", "time", "over ours", "quartiles", "saved", "peak", "largest error")]
    for name, row in result["rows"].items():
        if row.get("failure"):
            rows.append((name, "", row["failure"][:80], "", "", "", "", ""))
            continue
        worst = max(row["check"], key=row["check"].get)
        wrong = f"{row['check'][worst]:.1e} {worst}" + ("" if row["passed"] else " FAILED")
        memory = size(row["memory"]["peak_bytes"]) if row.get("memory") else ""
        for way, took in row.get("times", {}).items():
            ratio = result["ratios"][way]["over ours"].get(name)
            pair = (f"{ratio['median']:.3f}", f"{ratio['low']:.3f} .. {ratio['high']:.3f}") if ratio else ("", "")
            rows.append((name, way, duration(took["median"]), *pair, size(row["saved_bytes"]), memory, wrong))
        rows += [(name, way, text[:90], "", "", "", "", "") for way, text in row.get("failures", {}).items()]
    return table(rows, right={3})


def bars(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a picture shows: the ratios of steps to ours."""
    return {
        ", ".join(str(value) for value in result["case"].values()): ratios["step"]["over ours"]
        for result in results
        if "step" in (ratios := result["ratios"])
    }
