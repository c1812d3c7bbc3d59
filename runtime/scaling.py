"""What a step of a deep model takes, from steps of a few of its blocks: repeated blocks are counted, not run.

Blocks that are alike add alike: with n of them in a row, every count is c + n b.  So a run of alike blocks (or of a
short pattern of them, sliding and full attention in turn) is cut to two repetitions, then to three, and the
difference is what each further one adds.  A maximum over the schedule is the largest of such lines, one a module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rewrite.runtime.adapter import Adapter
from rewrite.runtime.attach import attachment
from rewrite.runtime.dry_run import dry_run, without_numbers

_LONGEST = 8  # blocks in a pattern
_FEW = 3  # repetitions that are run as they are
_NUMBER = re.compile(r"\d+")

Group = tuple[str, tuple[int, ...], str]
"""Saved storages that differ in nothing but their layer: (module with * for numbers, shape, dtype)."""


@dataclass
class Counts:
    """What one training step takes.

    saved          storages kept for the backward by the min-cut partition: group -> [how many, bytes]
    default_saved  bytes kept by the default partition, which is what an eager step keeps
    peaks          most bytes alive at any operator of a module: saved, temporary, results and gradients
    """

    saved: dict[Group, list[float]] = field(default_factory=dict)
    default_saved: float = 0
    forward_flops: float = 0
    backward_flops: float = 0
    peaks: dict[str, float] = field(default_factory=dict)
    graphs: float = 0
    notes: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> float:
        return sum(size for _, size in self.saved.values())

    @property
    def peak(self) -> float:
        return max(self.peaks.values(), default=0)


@dataclass(frozen=True)
class Run:
    """`repeats` repetitions of a pattern of `period` blocks in the list `stack`, from number `start` on."""

    stack: str
    start: int
    period: int
    repeats: int


def counted(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], stacks: Sequence[str]) -> Counts:
    """Counts of a training step of `model`, attached or bare; `stacks` are the paths of its lists of blocks.

    Exact where alike blocks take alike; a model that does not run with fewer blocks is run as a whole.
    """
    bare, state = without_numbers(model), attachment(model)
    # A rule about the whole step (a budget) decides anew at every depth.
    alike = state is None or all(rule.local for _, rule in state.rules)
    runs = [run for stack in stacks for run in runs_of(bare, stack)] if alike else []
    base = {run: min(run.repeats, _FEW - 1) for run in runs}
    try:
        first = _step(bare, args, kwargs, base)
        total = first
        for run in runs:
            more = _step(bare, args, kwargs, base | {run: _FEW})
            total = _extended(total, first, more, run.repeats - base[run])
        return total
    except Exception:
        if not runs:
            raise
    return _step(bare, args, kwargs, {})


def runs_of(model: nn.Module, stack: str) -> Iterator[Run]:
    """The runs of more than `_FEW` repetitions in a list of blocks, the longest first at every place."""
    blocks = list(_list(model, stack))
    signs, start = _signatures(model, stack), 0
    while start < len(blocks):
        lengths = {p: _repeats(signs, start, p) for p in range(1, _LONGEST + 1)}
        period = max(lengths, key=lambda p: (lengths[p] * p if lengths[p] > _FEW else 0, -p))
        if lengths[period] > _FEW:
            yield Run(stack, start, period, lengths[period])
            start += period * lengths[period]
        else:
            start += 1


def _repeats(signs: Sequence[object], start: int, period: int) -> int:
    count, pattern = 1, signs[start : start + period]
    while len(pattern) == period and signs[start + count * period : start + (count + 1) * period] == pattern:
        count += 1
    return count


def _signatures(model: nn.Module, stack: str) -> list[object]:
    """What tells blocks apart: modules, tensors, what trains and is hooked there, and whether a gradient comes in."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    order = [name for name, _ in model.named_parameters()]
    first = min((order.index(name) for name in names), default=len(order))
    found = []
    for number, block in enumerate(_list(model, stack)):
        inside = [n for n, name in enumerate(order) if name.startswith(f"{stack}.{number}.")]
        found.append((bool(inside) and first < inside[0], *_sign(block)))
    return found


def _sign(block: nn.Module) -> Iterator[object]:
    for path, module in block.named_modules():
        # By name: a parametrised module has a class of its own.
        yield path, type(module).__qualname__, len(module._forward_hooks), len(module._forward_pre_hooks)
        if isinstance(module, Adapter):
            yield module.graft.label, module.graft.op
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield name, None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _list(model: nn.Module, stack: str) -> Any:
    return model.get_submodule(stack)


def _step(bare: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kept: Mapping[Run, int]) -> Counts:
    """Counts of a step with so many repetitions of every run."""
    model = without_numbers(bare)
    for stack in {run.stack for run in kept}:
        gone = {
            block
            for run, repeats in kept.items()
            if run.stack == stack
            for block in range(run.start + run.period * repeats, run.start + run.period * run.repeats)
        }
        blocks = _list(model, stack)
        left = [block for number, block in enumerate(blocks) if number not in gone]
        parent, _, name = stack.rpartition(".")
        setattr(
            model.get_submodule(parent),
            name,
            type(blocks)(left) if type(blocks) is nn.ModuleList else nn.Sequential(*left),
        )
    found = Counts()
    for record in dry_run(model, args, kwargs):
        if "saved" in record.counts:
            _add(found, record.counts)
    return found


def _add(found: Counts, counts: Mapping[str, Any]) -> None:
    before = found.saved_bytes  # of the graphs before this one, if the model is captured as several
    for one in counts["saved"]:
        group = found.saved.setdefault((masked(one["site"]), tuple(one["shape"]), one["dtype"]), [0, 0])
        group[0] += 1
        group[1] += one["bytes"]
    found.default_saved += sum(one["bytes"] for one in counts["default_saved"])
    found.forward_flops += counts["forward_flops"]
    found.backward_flops += counts["backward_flops"]
    found.graphs += 1
    for site, size in counts["peaks"].items():
        found.peaks[masked(site)] = max(found.peaks.get(masked(site), 0), before + size)


def masked(site: str) -> str:
    """A module's path with * for every number.

    >>> masked("model.layers.12.mlp")
    'model.layers.*.mlp'
    """
    return _NUMBER.sub("*", site)


def _extended(total: Counts, first: Counts, more: Counts, times: int) -> Counts:
    """`total` with what `more` has beyond `first`, so many times."""

    def line(a: float, b: float, c: float) -> float:
        return a + (c - b) * times

    groups: dict[Group, list[float]] = defaultdict(lambda: [0, 0])
    for group in {**total.saved, **more.saved}:
        was, one, two = (c.saved.get(group, [0, 0]) for c in (total, first, more))
        groups[group] = [line(*numbers) for numbers in zip(was, one, two, strict=True)]
    sites = {**total.peaks, **more.peaks}
    return Counts(
        saved={group: value for group, value in groups.items() if value[0]},
        default_saved=line(total.default_saved, first.default_saved, more.default_saved),
        forward_flops=line(total.forward_flops, first.forward_flops, more.forward_flops),
        backward_flops=line(total.backward_flops, first.backward_flops, more.backward_flops),
        peaks={s: line(*(c.peaks.get(s, 0) for c in (total, first, more))) for s in sites},
        graphs=total.graphs,
    )
