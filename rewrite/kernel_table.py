"""The generated kernels as a table: what each takes on a GPU, counted from its machine code, and its route on a CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from tqdm import tqdm

from rewrite.codegen.kernels import aot, catalogue
from rewrite.codegen.kernels.kernel import Config, Kernel
from rewrite.codegen.kernels.target import TARGETS, Target
from rewrite.errors import RewriteError, nearest
from rewrite.table import size, table


@dataclass(frozen=True)
class Checked:
    """One configuration of one structure, compiled for one target."""

    kernel: Kernel
    config: Config
    target: Target
    found: aot.Resources

    @property
    def complaints(self) -> list[str]:
        return aot.complaints(self.kernel, self.config, self.target, self.found)


def checked(names: Sequence[str] = (), targets: Sequence[str] = ()) -> list[Checked]:
    """Every configuration of every example, or of the named kernels and targets alone, compiled in two processes.

    Raises `RewriteError` where Triton is not installed, or where no kernel has a name.

    Example: `checked(["nf4_dequantise"], ["sm_90"])`
    """
    if importlib.util.find_spec("triton") is None:
        raise RewriteError(
            "compiling kernels needs Triton, but no GPU: pip install 'triton==3.7.1' (it has wheels for Linux alone); "
            "--source NAME prints a source without it"
        )
    wanted = {kernel.name for name in names for kernel in examples(name)}
    jobs = [
        (kernel, config, target)
        for name, target in TARGETS.items()
        if not targets or name in targets
        for kernel, config in catalogue.launches(target)
        if not wanted or kernel.name in wanted
    ]
    results = tqdm(aot.compile_all(jobs), desc="compile", total=len(jobs), unit="config", leave=False, delay=1.0)
    return [Checked(*job, found) for job, found in zip(jobs, results, strict=True)]


def examples(name: str) -> list[Kernel]:
    """The example structures of the kernel of that name; raises `RewriteError` where there is none."""
    known = [kernel for kernel in catalogue.examples() if kernel.name == name]
    if not known:
        names = sorted({kernel.name for kernel in catalogue.examples()})
        close = nearest(name, names, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}"
        raise RewriteError(f"unknown kernel '{name}', {hint}")
    return known


def text(results: Iterable[Checked]) -> str:
    """A row per kernel and target.

    Registers, spills and shared memory are those of the default configuration, then the largest of all.
    """
    rows = [("kernel", "target", "configs", "registers", "spills", "shared memory", "where it applies", "on a CPU")]
    rows += [_row(group) for group in _groups(results)]
    return "\n".join([*table(rows, right={2, 3, 4, 5}), "", "registers, spills, shared memory: default / largest"])


def complaints(results: Iterable[Checked]) -> list[str]:
    """A line for everything that is wrong with a compiled configuration."""
    return [f"{c.kernel} on {c.target.name}, {c.config}: {wrong}" for c in results for wrong in c.complaints]


def to_json(results: Iterable[Checked]) -> str:
    """Every compiled configuration with all that was counted."""
    return json.dumps([_record(each) for each in results], indent=1)


def _record(each: Checked) -> dict[str, object]:
    kernel, config = each.kernel, each.config
    return {
        "kernel": kernel.name,
        "target": each.target.name,
        "structure": repr(kernel),
        "tiles": dict(config.tiles),
        "warps": config.warps,
        "stages": config.stages,
        "fp_fusion": kernel.fp_fusion,
        **asdict(each.found),
        "complaints": each.complaints,
        "applies": kernel.applies,
        "cpu": kernel.cpu,
    }


def _groups(results: Iterable[Checked]) -> list[list[Checked]]:
    """The results of one kernel and target each, in the order of their names."""
    groups: dict[tuple[str, str], list[Checked]] = {}
    for each in results:
        groups.setdefault((each.kernel.name, each.target.name), []).append(each)
    return [groups[key] for key in sorted(groups)]


def _row(group: Sequence[Checked]) -> tuple[str, ...]:
    default, found = group[0], [each.found for each in group]
    shared = [f.shared for f in found]
    return (
        default.kernel.name,
        default.target.name,
        str(len(group)),
        f"{default.found.registers} / {max(f.registers for f in found)}",
        f"{default.found.spills} / {max(f.spills for f in found)}",
        f"{size(default.found.shared)} / {size(max(shared))}",
        default.kernel.applies,
        default.kernel.cpu,
    )
