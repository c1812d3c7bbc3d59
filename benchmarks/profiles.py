"""Kernel tables of one step of every contender, as text, to explain what was timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from contest import Contest, Row, prepare, stepper
from harness import Gate, Step, synchronize
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

STEPS = 3


def profile(contest: Contest, names: Sequence[str], file: Path, gate: Gate) -> None:
    """Append the tables of a case to `file`."""
    with gate.preparing():
        problem, rows = contest.problem(), dict[str, Row]()
        contenders = prepare(contest, problem, names, rows)
    steps = {name: stepper(c, problem.batches) for name, c in contenders.items()}
    failed = "".join(f"{name}: {row.failure}\n" for name, row in rows.items() if row.failure)
    file.parent.mkdir(parents=True, exist_ok=True)
    with gate.measuring(), file.open("a") as out:
        out.write(f"# {contest.case}\n{failed}" + tables(steps, contest.case.device))


def tables(steps: Mapping[str, Step], device: torch.device) -> str:
    """Time by kernel on a GPU, by operator elsewhere, over some steps of each."""
    gpu, found = device.type == "cuda", list[str]()
    for name, step in steps.items():
        for k in range(STEPS):
            step(k)
        synchronize(device)
        with record(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
            for k in range(STEPS):
                step(k)
            synchronize(device)
        by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70)
        found.append(f"## {name}, {STEPS} steps\n{table}\n")
    return "\n".join(found)
