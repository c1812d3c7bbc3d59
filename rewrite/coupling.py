"""Coupled structures: the rows and columns of several weights that make one head, or one channel.

A head of an attention is rows of its query, key and value projections and columns of its output projection; a channel
of a feed-forward network is a row of `up` and `gate` and a column of `down`.  They can change places, or be left out,
only together, biases with them; query heads that share a key stay together too.

Nothing here trusts a pattern: every change is tried on a batch, and taken back where the function is not what it must
be (a model may treat its heads differently by a slope, a sink, a norm over all of them, or sizes of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rewrite import inventory
from rewrite.codegen.maps import LayerMap, Rows
from rewrite.errors import RewriteError, nearest
from rewrite.paths import element_of
from rewrite.runtime.adapter import ADAPTERS
from rewrite.runtime.attach import adapter_state, attachment
from rewrite.sites import Site, find
from rewrite.structure.flow import common
from rewrite.structure.inputs import Inputs, candidates
from rewrite.table import table

Tensor = torch.Tensor
PROJECTIONS = ("q", "k", "v", "o")
Units = Mapping[str, Sequence[int]]
"""Numbers of heads or channels, by the name of their group."""


@dataclass(frozen=True)
class Member:
    """Rows or columns of one weight: unit u of its group is entries [u * size, (u + 1) * size) of `rows`, or of all."""

    path: str
    tensor: str
    map: LayerMap
    side: Literal["rows", "columns"]
    rows: Rows | None
    count: int  # of units: key and value heads may be fewer
    size: int
    width: int  # entries of the matrix along that side

    @property
    def dim(self) -> int:
        return -2 if self.side == "rows" else -1

    def places(self) -> list[int]:
        """All its entries along the side of the matrix."""
        return self.rows.indices() if self.rows is not None else list(range(self.width))

    def entries(self, units: Sequence[int]) -> Tensor:
        """Where these units stand along the side of the matrix."""
        return torch.tensor(self.places()).view(self.count, self.size)[list(units)].flatten()


@dataclass(frozen=True)
class Group:
    """The weights that share heads or channels: their number, and how many of them share one key."""

    name: str
    kind: Literal["heads", "channels"]
    count: int
    sharing: int
    members: tuple[Member, ...]

    def per_member(self, units: Sequence[int]) -> Iterator[tuple[Member, list[int]]]:
        """Every member with its own units: of shared keys, those of the chosen queries."""
        for member in self.members:
            each = self.count // member.count
            yield member, [unit // each for unit in units[::each]] if member.count < self.count else list(units)

    def check(self, units: Sequence[int], whole: bool) -> list[int]:
        """`units` if they can be chosen together; raises `RewriteError` with the reason otherwise."""
        units = [int(u) for u in units]
        if len(set(units)) < len(units) or not units or not set(units) <= set(range(self.count)):
            raise RewriteError(f"{self.name} has {self.kind} 0 to {self.count - 1}, each at most once; got {units[:8]}")
        if whole and len(units) < self.count:
            raise RewriteError(f"a permutation of {self.name} has all {self.count} {self.kind}, got {len(units)}")
        shares = [unit // self.sharing for unit in units]
        runs = [shares[i : i + self.sharing] for i in range(0, len(units), self.sharing)]
        if any(len(run) < self.sharing or len(set(run)) > 1 for run in runs):
            raise RewriteError(
                f"heads of {self.name} share keys, {self.sharing} each ({self.sharing * (shares[0])} to "
                f"{self.sharing * (shares[0] + 1) - 1} do): they stay together, got {units[:8]}"
            )
        return units


class Coupled:
    """The coupled structures of a model, by name; prints as a table."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], inputs: Inputs | None = None) -> None:
        self.model, self.inputs = model, inputs
        self.groups = {group.name: group for group in groups}

    def __getitem__(self, name: str) -> Group:
        if name not in self.groups:
            close = ", ".join(nearest(name, self.groups)) or ", ".join(list(self.groups)[:4])
            raise RewriteError(f"no coupled weights '{name}'; nearest: {close}")
        return self.groups[name]

    def permute(self, order: Units) -> nn.Module:
        """Reorder heads and channels in place: unit i becomes the one that was `order[name][i]`; the model comes back.

        The function stays as it was, up to the order of sums.  Raises `RewriteError`, and changes nothing, where an
        order tears shared keys apart or the function changes all the same.

        Example: `rewrite.coupled(model).permute({"model.layers.0.mlp": scores.argsort(descending=True).tolist()})`
        """
        chosen = {name: self[name].check(units, whole=True) for name, units in order.items()}
        with self._trial(chosen, zeroed=False):
            for name, units in chosen.items():
                _apply(self.model, self[name], units)
        return self.model

    def shrink(self, keep: Units) -> nn.Module:
        """Leave out all heads and channels but those named, in place; the smaller model comes back.

        It computes what the model did with the columns of the others at zero.  Raises `RewriteError`, and changes
        nothing, where it does not.  Copy the model first to keep it: `rewrite.coupled(copy.deepcopy(model))`.
        """
        chosen = {name: sorted(self[name].check(sorted(units), whole=False)) for name, units in keep.items()}
        with self._trial(chosen, zeroed=True):
            for name, units in chosen.items():
                _apply(self.model, self[name], units)
        return self.model

    def recover(self, small: nn.Module, keep: Units) -> nn.Module:
        """Put what the adapters of a shrunk model have learned at the kept places of this one, zeros elsewhere.

        This model must have the same spec attached (`rewrite.attach`) as `small` has, which was shrunk with `keep`
        (LoRAM, Zhang et al. 2025); it comes back.
        """
        if small is self.model:
            raise RewriteError("recover takes the shrunk model: what it learned goes to this one")
        theirs, ours = adapter_state(small), adapter_state(self.model)
        if theirs.keys() != ours.keys():
            raise RewriteError("the two models have different adapters: attach the same spec to both")
        chosen = {name: sorted(int(u) for u in units) for name, units in keep.items()}
        placed = [(value, self._placed(name, theirs[name], value, chosen)) for name, value in ours.items()]
        with torch.no_grad():
            for value, new in placed:
                value.copy_(new)
        return self.model

    def _placed(self, name: str, small: Tensor, large: Tensor, keep: Mapping[str, Sequence[int]]) -> Tensor:
        """A tensor of an adapter of the small model, spread over the sizes of the large one."""
        path = name.partition(f".{ADAPTERS}.")[0]
        for dim in [d for d in range(large.ndim) if small.shape[d] != large.shape[d]]:
            fitting = [
                (member, member.entries(units))
                for group, kept in keep.items()
                for member, units in self[group].per_member(kept)
                if member.path == path
            ]
            index = next((i for m, entries in fitting for i in _along(m, entries, small, large, dim)), None)
            if index is None or not large.is_floating_point():
                raise RewriteError(f"{name} is {tuple(small.shape)} and {tuple(large.shape)}: it cannot be recovered")
            shape = (*small.shape[:dim], large.shape[dim], *small.shape[dim + 1 :])
            small = small.new_zeros(shape).index_copy_(dim, index.to(small.device), small)
        return small.to(large.device, large.dtype)

    @contextmanager
    def _trial(self, chosen: Mapping[str, Sequence[int]], zeroed: bool) -> Iterator[None]:
        """A change of the weights that is taken back where it does not leave the function as it must be."""
        call = _forward(self.model, self.inputs)
        touched = [(self.model.get_submodule(m.path)) for name in chosen for m in self[name].members]
        before = [(module, dict(module._parameters), _sizes(module)) for module in dict.fromkeys(touched)]
        if zeroed:
            with _without(self.model, [(self[name], units) for name, units in chosen.items()]):
                expected = call()
        else:
            expected = call()
        try:
            yield
            difference = _difference(call(), expected)
            if difference > torch.finfo(expected[0].dtype).eps ** 0.5:
                raise RewriteError(
                    f"{type(self.model).__name__} does not treat its {self[next(iter(chosen))].kind} alike: outputs "
                    f"change by {difference:.2g}. A bias or a norm of its own goes with each of them."
                )
        except Exception as error:
            for module, parameters, sizes in before:
                module._parameters.update(parameters)
                vars(module).update(sizes)
            if isinstance(error, RewriteError):
                raise
            raise RewriteError(
                f"{type(self.model).__name__} does not run with other sizes: {str(error).partition(chr(10))[0]}"
            ) from error

    def __repr__(self) -> str:
        rows = [("name", "kind", "count", "shared", "weights")]
        for group in self.groups.values():
            weights = ", ".join(m.path.removeprefix(f"{group.name}.") for m in group.members)
            rows.append((group.name, group.kind, str(group.count), str(group.sharing), weights))
        return "\n".join(table(rows))


def coupled(model: nn.Module, *, inputs: Any = None) -> Coupled:
    """The heads and channels of `model` that several weights make together: permute, shrink, recover.

    `inputs` is a batch for it, as in `rewrite.plan`; changes are checked on it.

    Example: `rewrite.coupled(model).shrink({"model.layers.0.mlp": range(0, 11008, 2)})`
    """
    if attachment(model) is not None:
        raise RewriteError("this model is adapted: take its coupled structures before rewrite.attach")
    given = None if inputs is None else Inputs.of(inputs)
    found = inventory.take(model, given)
    if found.structure is None:
        raise RewriteError(f"no forward of this {found.model} could be recorded ({found.untraced}): pass inputs=...")
    by_network: dict[tuple[str, str], list[Site]] = {}
    for site in find(found).sites:
        network = _network(site)
        if network and not site.place.tied and site.kind == "linear":
            by_network.setdefault((element_of(site.path, found.blocks), network), []).append(site)
    groups = [_group(sites, network) for (_, network), sites in by_network.items()]
    return Coupled(model, [g for g in groups if g is not None], given)


def _network(site: Site) -> str:
    """Which network of its block a site is a part of: attn, cross, ffn, or none."""
    head, _, leaf = site.roles[0].partition(".")
    parts = {"attn": PROJECTIONS, "cross": PROJECTIONS, "ffn": ("up", "gate", "down")}
    return head if leaf in parts.get(head, ()) else ""


def _group(sites: Sequence[Site], network: str) -> Group | None:
    """The group of the projections of one network; None where they are not one of each."""
    parts: dict[str, Site] = {}
    for site in sites:
        leaf = site.roles[0].partition(".")[2]
        if leaf in parts:
            return None
        parts[leaf] = site
    if network == "ffn":
        if not {"up", "down"} <= parts.keys():
            return None
        sizes, last = dict.fromkeys(parts, 1), parts["down"]
    else:
        if parts.keys() != set(PROJECTIONS) or any(s.head is None for s in sites):
            return None
        sizes, last = {leaf: int(s.head or 0) for leaf, s in parts.items()}, parts["o"]
    members = tuple(_member(site, sizes[leaf], site is last) for leaf, site in parts.items())
    count = last.in_features // sizes[last.roles[0].partition(".")[2]]
    if any(m.count * m.size != (len(m.rows) if m.rows else m.width) or count % m.count for m in members):
        return None
    name = common([site.path for site in sites])
    kind: Literal["heads", "channels"] = "channels" if network == "ffn" else "heads"
    return Group(name, kind, count, count // min(m.count for m in members), members)


def _member(site: Site, size: int, last: bool) -> Member:
    place = site.place
    if last:
        return Member(
            site.path, place.tensor, place.map, "columns", None, site.in_features // size, size, site.in_features
        )
    width = place.matrix[-2]
    return Member(site.path, place.tensor, place.map, "rows", site.rows, site.out_features // size, size, width)


def _apply(model: nn.Module, group: Group, units: Sequence[int]) -> None:
    """Keep these units of a group, in this order, in every weight and bias."""
    weights: dict[tuple[str, str], list[tuple[Member, list[int]]]] = {}
    for member, own in group.per_member(units):
        weights.setdefault((member.path, member.side), []).append((member, own))
    for (path, side), parts in weights.items():
        module, member = model.get_submodule(path), parts[0][0]
        weight, bias = module.get_parameter(member.tensor), module._parameters.get("bias")
        index = _selection(parts).to(weight.device)
        matrix = member.map.matrix(weight.detach()).index_select(member.dim, index)
        _replace(module, member.tensor, member.map.stored(matrix, ()))
        if side == "rows" and bias is not None:
            _replace(module, "bias", bias.detach().index_select(0, index))
        for name in _OUT if side == "rows" else _IN:
            if name in vars(module):
                setattr(module, name, len(index))


def _selection(parts: Sequence[tuple[Member, Sequence[int]]]) -> Tensor:
    """What is left of one side of a weight, parts of which have these units: each fills its own places, from the first.

    Entries of no part stay.
    """
    fills: dict[int, Iterator[int]] = {}
    for member, units in parts:
        entries = iter(member.entries(units).tolist())
        fills |= dict.fromkeys(member.places(), entries)
    found = (next(fills[place], None) if place in fills else place for place in range(parts[0][0].width))
    return torch.tensor([entry for entry in found if entry is not None])


_OUT, _IN = ("out_features", "nf"), ("in_features", "nx")
"""What `nn.Linear` and transformers' `Conv1D` call their sizes."""


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in (*_OUT, *_IN) if name in vars(module)}


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = module.get_parameter(name)
    module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)


def _along(member: Member, entries: Tensor, small: Tensor, large: Tensor, dim: int) -> Iterator[Tensor]:
    """Where the entries of a member stand along a dimension of an adapter's tensor, if that runs along its side."""
    if len(entries) != small.shape[dim]:
        return
    if large.shape[dim] == member.width:
        yield entries
    elif member.rows is not None and large.shape[dim] == len(member.rows):
        places = {entry: number for number, entry in enumerate(member.rows.indices())}
        yield torch.tensor([places[e] for e in entries.tolist()])


@contextmanager
def _without(model: nn.Module, kept: Sequence[tuple[Group, Sequence[int]]]) -> Iterator[None]:
    """The columns of all units but those that are kept at zero, for a while."""
    saved: list[tuple[Tensor, Tensor]] = []
    for group, units in kept:
        gone = sorted(set(range(group.count)) - set(units))
        member = next(m for m in group.members if m.side == "columns")
        weight = model.get_submodule(member.path).get_parameter(member.tensor)
        saved.append((weight.data, weight.data.clone()))
        member.map.matrix(weight.data)[:, member.entries(gone).to(weight.device)] = 0
    try:
        yield
    finally:
        for data, before in saved:
            data.copy_(before)


def _forward(model: nn.Module, inputs: Inputs | None) -> Callable[[], list[Tensor]]:
    """A forward in evaluation mode on the first batch that runs: its floating-point outputs."""

    def run(given: Inputs) -> list[Tensor]:
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                output = model.forward(*given.args, **given.kwargs)
        finally:
            for module in training:
                module.training = True
        leaves = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
        return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]

    first: Exception | None = None
    for given in [inputs] if inputs is not None else candidates(model):
        try:
            run(given)
            return lambda given=given: run(given)
        except Exception as error:
            first = first or error
    raise RewriteError(f"no batch to check a change with: pass inputs=... ({first})")


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    pairs = list(zip(found, expected, strict=True))
    worst = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]
    return max((w if w == w else float("inf") for w in worst), default=0.0)
