"""What every benchmark shares: interleaved timing, ratios with their spread, memory, and results as JSON and picture.

A round runs every contender once, in an order that rotates from round to round; a ratio compares two samples of one
round, so that a disturbance of the machine hits both.  A sample is several steps in a row, so that a device is never
timed while it waits for its first kernel, and times come from the device's own clock where it has one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Tensor = torch.Tensor
Step = Callable[[int], object]
"""One step; its argument counts the steps, for a choice of inputs."""
OURS = "rewrite"
SAMPLE = 0.02
"""Seconds that one sample lasts at least."""
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "liger_kernel",
    "unsloth",
    "accelerate",
)


class Deadline:
    """Seconds that are left of a budget; none is no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.left <= 0


class Gate:
    """Keeps processes that measure apart from those that compile, on one machine, by a lock on a file.

    Any number may prepare at a time; who measures is alone.  No file (`REWRITE_BENCH_LOCK`): nobody else is there.
    """

    def __init__(self, file: str | None = None) -> None:
        self.file = file or os.environ.get("REWRITE_BENCH_LOCK")

    @contextlib.contextmanager
    def _held(self, how: int) -> Iterator[None]:
        if not self.file:
            yield
            return
        with open(self.file, "a") as lock:
            fcntl.flock(lock, how)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        return self._held(fcntl.LOCK_SH)

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        return self._held(fcntl.LOCK_EX)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(step: Step, first: int, steps: int, device: torch.device) -> float:
    """Seconds a step, over `steps` steps in a row: by events on a GPU, by the host's clock elsewhere."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for k in range(first, first + steps):
            step(k)
        return (time.perf_counter() - begin) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for k in range(first, first + steps):
        step(k)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds at most and at least, seconds in all, and rounds that are not counted."""

    rounds: int = 20
    least: int = 5
    warmup: int = 3
    seconds: float = math.inf


def measure(steps: Mapping[str, Step], device: torch.device, plan: Plan) -> dict[str, list[float]]:
    """Seconds a step of every contender in every round, interleaved; fewer rounds where they would take too long."""
    names, counts, expected = list(steps), dict[str, int](), 0.0
    for name in names:
        for k in range(plan.warmup):
            steps[name](k)
        seconds = sample(steps[name], plan.warmup, 1, device)
        counts[name] = max(1, math.ceil(SAMPLE / max(seconds, 1e-7)))
        expected += seconds * counts[name]
    rounds = plan.rounds
    if expected * rounds > plan.seconds:
        rounds = max(min(plan.least, plan.rounds), int(plan.seconds / expected))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for shift in range(len(names)):
            name = names[(turn + shift) % len(names)]
            times[name].append(sample(steps[name], turn * counts[name], counts[name], device))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """`other / base`, round by round: median, quartiles and all pairs."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        if name != base and base in times:
            pairs = [a / b for a, b in zip(values, times[base], strict=True)]
            found[name] = {**spread(pairs), "pairs": pairs}
    return found


def saved_bytes(forward: Callable[[], object], known: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for a backward pass, each storage once, without those of `known` tensors.

    For compiled functions too: what they save passes through the same hooks.
    """
    held = {t.untyped_storage().data_ptr() for t in known}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a tensor without a storage of its own
            if (at := t.untyped_storage().data_ptr()) not in held:
                sizes[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(sizes.values())


def memory(step: Step, forward: Callable[[], object], device: torch.device) -> dict[str, int]:
    """On a GPU: the peak of a step over what was allocated before it, and what stands between forward and backward."""
    if device.type != "cuda":
        return {}
    step(0)
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(1)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    before = torch.cuda.memory_allocated(device)
    out = forward()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    del out
    return {"peak_bytes": peak, "held_bytes": held}


def replayed(step: Step, device: torch.device) -> Step:
    """`step` as one captured CUDA graph on its first inputs: what the device needs, without its launches."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step(0)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step(0)
    held = [kept]  # its memory belongs to the graph

    def replay(_: int) -> object:
        graph.replay()
        return held

    return replay


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of some tensors, norm of the difference over the norm; infinite where one is none."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return math.inf
        size = float(torch.linalg.vector_norm(b.double()))
        off = float(torch.linalg.vector_norm(a.double() - b.double()))
        worst = max(worst, off / size if size else off)
        if not math.isfinite(worst):
            return math.inf
    return worst


def said(failure: BaseException) -> str:
    """An error in a line: its kind and the first line of its text."""
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0][:300]}" if text else type(failure).__name__


def release(device: torch.device) -> None:
    """Give back what a case held: graphs of Dynamo, tensors, the allocator's cache."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settings(args: argparse.Namespace) -> dict[str, str]:
    """The arguments of a run, for the head of a result; not the files that it wrote."""
    return {name: str(value) for name, value in vars(args).items() if not isinstance(value, Path)}


def about(device: torch.device) -> dict[str, Any]:
    """Machine and versions, for the head of a result."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, Any] = {"device": processor(), "threads": torch.get_num_threads(), "versions": versions}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return {**found, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def headline(data: Mapping[str, Any]) -> str:
    """Device and the versions that are there, in a line."""
    there = [f"{n} {v}" for n, v in data["versions"].items() if v != "not installed"]
    return f"{data['device']}, {data['threads']} threads, python {data['python']}, " + ", ".join(there)


def write(file: Path, data: object) -> None:
    """JSON, in place of what was there in one move: a reader, or a kill, never finds half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rough = file.with_name(f".{file.name}.{os.getpid()}")
    rough.write_text(json.dumps(data, indent=1) + "\n")
    rough.replace(file)


def picture(file: Path, title: str, groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Bars of ratios with their quartiles: a panel for every group, a bar for every contender; 1 is ours."""
    from matplotlib.figure import Figure

    groups = {name: bars for name, bars in groups.items() if bars}
    if not groups:
        return
    rows = [len(bars) for bars in groups.values()]
    figure = Figure(figsize=(8, 0.28 * sum(rows) + 0.55 * len(rows) + 0.8), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (name, bars) in zip(panels, groups.items(), strict=True):
        values = [bar["median"] for bar in bars.values()]
        below = [max(0.0, bar["median"] - bar["low"]) for bar in bars.values()]
        above = [max(0.0, bar["high"] - bar["median"]) for bar in bars.values()]
        axes.barh(range(len(bars)), values, xerr=[below, above], color="#3d6da8", error_kw={"linewidth": 1})
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="#b3590b", linewidth=1)
        axes.set_title(name, fontsize=8, loc="left")
        axes.spines[["right", "top"]].set_visible(False)
    panels[-1].set_xlabel(f"{title}: time over that of {OURS}, median and quartiles")
    figure.savefig(file, dpi=120)
