"""Making a training step fit a memory: what to recompute, store in fewer bits or leave out, by counting.

Options are tried in the order of what they cost: time, digits of gradients, digits of the frozen weights, adapted
layers.  Each is counted (`rewrite.estimate`), and the first that fits is taken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from rewrite import planning
from rewrite.errors import ResolveError, RewriteError
from rewrite.estimate import Estimate, Estimator
from rewrite.method import Method, states
from rewrite.parser import parse
from rewrite.runtime.holdings import holdings
from rewrite.spec import Layers, Spec
from rewrite.structure.inputs import Inputs
from rewrite.table import size

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)

SHORT, RECOMPUTE, SAVE, STORE = "recompute@ffn", "recompute@blocks", "save(fp8)", "nf4(base)"
OPTIONS: tuple[tuple[str, ...], ...] = (
    (),
    (SHORT,),
    (SAVE,),
    (RECOMPUTE,),
    (STORE,),
    (STORE, SHORT),
    (STORE, SAVE),
    (STORE, RECOMPUTE),
)
"""What may be added to a spec, in the order in which it is tried: a fifth more time, rounded gradients, a third more
time; then the same with rounded weights."""
_SHARES = (2, 4, 8)
"""Last, with the tightest of those: adapters in the last half, quarter, eighth of the blocks alone."""


@dataclass(frozen=True)
class Fit:
    """A spec that fits, and what was added to it and why in words."""

    spec: str
    note: str


def amount(text: str | int) -> int:
    """Bytes that a text such as `12GiB`, `800 MB` or a number means; raises `RewriteError` for other texts.

    >>> amount("1.5KiB"), amount("2GB"), amount(7)
    (1536, 2000000000, 7)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = _AMOUNT.fullmatch(text) if isinstance(text, str) else None
    if found is None or not float(found[1]):
        raise RewriteError(f"memory is an amount such as '12GiB' or '800MB', got {text!r}")
    return int(float(found[1]) * (_UNITS | _BINARY)[(found[2] or "").lower()])


def fit(model: nn.Module, spec: str | Spec, memory: str | int, batch: Inputs) -> Fit:
    """The cheapest way to train `spec` within `memory`: the peak of a step, operator by operator, on `batch`.

    Raises `RewriteError` with the smallest figure that was found where nothing fits.
    """
    limit, estimator, trials = amount(memory), Estimator(model, batch), list[_Trial]()
    with tqdm(list(_candidates(estimator, spec)), desc="fit", delay=2, leave=False) as candidates:
        for trial, added in candidates:
            candidates.set_postfix_str(", ".join(added) or "as it is", refresh=False)
            made = _attached(estimator, trial, added)
            if made is None:
                continue
            trials.append(_Trial(estimator, made, added))
            if trials[-1].held <= limit and trials[-1].peak <= limit:
                return _chosen(memory, trials)
    smallest = min((t for t in trials if t.held <= limit), key=lambda t: t.peak, default=trials[-1])
    raise RewriteError(
        f"a step does not fit {_words(memory)}: the smallest found takes {size(smallest.peak)}, with "
        f"'{smallest.estimate.spec}'; take fewer tokens, a smaller batch or fewer adapted sites"
    )


@dataclass
class _Trial:
    """A candidate: what it holds is known at once, its step is counted when it is asked for."""

    estimator: Estimator
    model: nn.Module
    added: tuple[str, ...]

    @functools.cached_property
    def held(self) -> int:
        """Bytes of weights, adapters and optimizer state."""
        held = holdings(self.model)
        return sum(h.bytes for h in held) + 2 * sum(h.bytes for h in held if h.trains)

    @functools.cached_property
    def estimate(self) -> Estimate:
        return self.estimator.counted(self.model)

    @functools.cached_property
    def peak(self) -> int:
        return self.held + round(self.estimate.counts.peak)


def _attached(estimator: Estimator, spec: Spec, added: tuple[str, ...]) -> nn.Module | None:
    try:
        return estimator.attached(spec)
    except ResolveError:  # what is added has no place in this model, or does not go with what is asked for
        if not added:
            raise
    return None


def _chosen(memory: str | int, trials: Sequence[_Trial]) -> Fit:
    first, last = trials[0], trials[-1]
    note = f"memory={_words(memory)}: a step takes {size(last.peak)} at its peak"
    if last.added:
        before = f"more than {size(first.held)}" if "peak" not in vars(first) else size(first.peak)
        note += f" with {' + '.join(last.added)} added, {before} without"
    return Fit(last.estimate.spec, note)


def _candidates(estimator: Estimator, spec: str | Spec) -> Iterator[tuple[Spec, tuple[str, ...]]]:
    """(spec, what was added to it) in the order in which they are tried."""
    given, bound = planning.read(spec)
    methods = [b.method for b in bound]
    closed = set[str]()  # what the spec decides itself, or cannot bear
    if any(states(m, "keeps") for m in methods):
        closed |= {SHORT, SAVE, RECOMPUTE}
    if any(m.view() in ("storage", "train") for m in methods):
        closed |= {STORE}
    options = [option for option in OPTIONS if not closed & set(option)]
    for option in options:
        yield _with(given, option), option
    depth = max((len(_list(estimator, path)) for path in estimator.inventory.blocks), default=0)
    for kept in (depth // share for share in _SHARES if depth >= share):
        layers = f"adapters in the last {kept} of {depth} blocks alone"
        yield _with(_last(given, methods, kept), options[-1]), (*options[-1], layers)


def _list(estimator: Estimator, path: str) -> Any:
    return estimator.bare.get_submodule(path)


def _with(spec: Spec, clauses: Sequence[str]) -> Spec:
    return parse(" + ".join([str(spec), *clauses]))


def _last(spec: Spec, methods: Sequence[Method], kept: int) -> Spec:
    """The spec with its adapters in the last `kept` blocks alone."""
    layers = Layers(start=-kept)
    clauses = [
        clause if clause.sites is None or m.view() in ("storage", "train", "policy")
        else replace(clause, sites=clause.sites.moved(clause.sites.span, layers))
        for clause, m in zip(spec.clauses, methods, strict=True)
    ]  # fmt: skip
    return replace(spec, clauses=tuple(clauses))


def _words(memory: str | int) -> str:
    return memory if isinstance(memory, str) else size(memory)
