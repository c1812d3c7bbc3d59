"""Blocks as a side network sees them: widths, heads, what their attention sees, and where the last of them is read.

Everything comes from the recorded forward and the roles of the weights in a block; no architecture is mentioned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from rewrite.inventory import Inventory, Place
from rewrite.paths import element_of, parent
from rewrite.runtime.graft import Source, Wiring
from rewrite.structure.repeated import Heads

if TYPE_CHECKING:
    from rewrite.sites import Site


@dataclass(frozen=True)
class Attends:
    """The attention of a block: heads of queries, of keys and values, and their width."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Block:
    """One block of a stack of `count`.

    `attention` and `cross` are None where a block has none, `feed` is the width of its feed-forward network, 0 for
    none.  `memory` is the width of what the cross attention of a side network reads, 0 for none.  `matrices` says
    where the block's own matrices lie, by role (`attn.q`, `cross.k`, `ffn.up`).  `last` is the stack's last block,
    `end` the module whose output is the stack's final hidden state: the norm behind that block, or the block.  `head`
    is the model's, by its path and how many numbers come out of it.  `wiring` is None where a block is more, or less,
    than attention and feed-forward network with a norm each.
    """

    path: str
    index: int
    count: int
    width: int
    attention: Attends | None
    cross: Attends | None
    feed: int
    gated: bool
    activation: str
    layer_norm: bool  # or one by the root mean square
    causal: bool
    first: str
    last: str
    end: str
    memory: int = 0
    head: tuple[str, int] | None = None
    wiring: Wiring | None = field(default=None, hash=False)
    matrices: Mapping[str, Source] = field(default_factory=dict, hash=False)
    refusal: str = ""  # why no side network can stand beside it

    @property
    def stack(self) -> str:
        return parent(self.path)


Ends = Literal["end", "late", "head"]
SidePart = Literal["entry", "rung", "late", "end", "head", "memory"]
"""What a site is to a side network: where the stack begins, a block, the input of its last block, the end of the
stack, the model's head, or the end of the stack where a decoder beside it reads the side network's output."""


def described(inventory: Inventory, sites: Sequence[Site]) -> dict[str, Block]:
    """The blocks of a model by path, from its sites."""
    inside: dict[str, list[Site]] = {}
    for site in sites:
        if (path := element_of(site.path, inventory.blocks)) and site.kind != "block":
            inside.setdefault(path, []).append(site)
    heads = [(s.path, s.out_features) for s in sites if "head" in s.roles and s.kind == "linear" and s.place.called]
    head = heads[0] if len(heads) == 1 else None
    found = {s.path: _block(inventory, s.path, inside.get(s.path, [])) for s in sites if s.kind == "block"}
    return {path: replace(block, head=head) for path, block in found.items()}


def _block(inventory: Inventory, path: str, inside: Sequence[Site]) -> Block:
    seen, stack = inventory.structure, parent(path)
    numbers = sorted({int(p.path[len(stack) + 1 :].partition(".")[0]) for p in inventory.places if _in(p, stack)})
    first, last = f"{stack}.{numbers[0]}", f"{stack}.{numbers[-1]}"
    called = seen.calls.get(path) if seen else None
    matrices = _matrices(inside)
    own = _heads(inventory, path)
    heads = next((h for h in own if not h.cross), None)
    cross = next((h for h in own if h.cross), None)
    down, norms = matrices.get("ffn.down"), [s.place for s in inside if s.kind == "norm"]
    attention = _attends(inside, "attn", heads)
    act = _activation(inventory, down)
    return Block(
        path=path,
        index=numbers.index(int(path.rpartition(".")[2])),
        count=len(numbers),
        width=called.shape[-1] if called and called.shape else 0,
        attention=attention,
        cross=_attends(inside, "cross", cross),
        feed=next((s.in_features for s in inside if "ffn.down" in s.roles), 0),
        gated=any("ffn.gate" in s.roles for s in inside),
        activation=act,
        layer_norm=any(p.type == "LayerNorm" or len(p.tensors) > 1 for p in norms),
        causal=bool(heads and heads.causal),
        first=first,
        last=last,
        end=_end(inventory, last),
        matrices=matrices,
        wiring=_wiring(inventory, path, matrices, attention, act) if len(norms) == 2 and cross is None else None,
        refusal=_refusal(inventory, path, own),
    )


def _in(place: Place, stack: str) -> bool:
    return place.path.startswith(f"{stack}.") and place.path[len(stack) + 1 :].partition(".")[0].isdigit()


def _heads(inventory: Inventory, path: str) -> list[Heads]:
    found = inventory.structure.heads if inventory.structure else {}
    return [h for p, h in found.items() if p == path or p.startswith(f"{path}.")]


def _attends(inside: Sequence[Site], group: str, heads: Heads | None) -> Attends | None:
    """Numbers of heads, from the rows of queries and keys."""
    rows = {role: sum(s.out_features for s in inside if _is(s, f"{group}.{role}")) for role in "qkv"}
    if heads is None or not all(rows.values()) or any(n % heads.width for n in (rows["q"], rows["k"])):
        return None
    q, k = rows["q"] // heads.width, rows["k"] // heads.width
    return Attends(q, k, heads.width) if q % k == 0 else None


def _is(site: Site, role: str) -> bool:
    """Whether a site is that projection; a cross attention's is no self attention's."""
    return role in site.roles and (role.startswith("cross") or "cross" not in site.roles)


ROLES = (
    *("attn.q", "attn.k", "attn.v", "attn.o", "cross.q", "cross.k", "cross.v", "cross.o"),
    *("ffn.gate", "ffn.up", "ffn.down"),
)


def _matrices(inside: Sequence[Site]) -> dict[str, Source]:
    """The matrices of a block that have a role of their own, one each."""
    found: dict[str, Source] = {}
    for role in ROLES:
        named = [s for s in inside if _is(s, role) and s.kind == "linear"]
        if len(named) == 1:
            site = named[0]
            found[role] = Source(site.path, site.place.tensor, site.place.map, site.rows)
    return found


def _activation(inventory: Inventory, down: Source | None) -> str:
    known = inventory.structure.activations if inventory.structure else {}
    return known.get(f"{down.path}.{down.tensor}", "silu") if down else "silu"


def _wiring(
    inventory: Inventory, path: str, matrices: Mapping[str, Source], attends: Attends | None, activation: str
) -> Wiring | None:
    """How a block puts its layers together: its norms are those in front of attention and feed-forward network, or
    the one in front of that network and the one at the end."""
    needed = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")
    seen = inventory.structure
    if seen is None or attends is None or not all(role in matrices for role in needed) or path not in seen.calls:
        return None
    norms = {p.path for p in inventory.places if p.kind == "norm" and p.path.startswith(f"{path}.")}
    first, second = (seen.sources.get(f"{s.path}.{s.tensor}") for s in (matrices["attn.q"], matrices["ffn.up"]))
    pre = first in norms
    pair = (first, second) if pre else (second, seen.calls[path].maker)
    if not norms.issuperset(pair) or pair[0] == pair[1]:
        return None
    layers = {role.rpartition(".")[2]: matrices[role] for role in (*needed, "ffn.gate") if role in matrices}
    one, two = (str(p) for p in pair)
    return Wiring(layers, (one, two), pre, activation, (attends.heads, attends.kv_heads), attends.width)


def _end(inventory: Inventory, last: str) -> str:
    """The norm that reads the last block of a stack, or that block."""
    called = inventory.structure.calls.get(last) if inventory.structure else None
    norms = {p.path for p in inventory.places if p.kind == "norm"}
    return next((r for r in called.readers if r in norms), last) if called else last


def _refusal(inventory: Inventory, path: str, heads: Sequence[Heads]) -> str:
    if inventory.structure is None:
        return "no forward of the model could be recorded, which says what its blocks compute: pass inputs={...}"
    called = inventory.structure.calls.get(path)
    if called is None:
        return "the recorded forward never calls it"
    if called.count > 1:
        return f"one forward calls it {called.count} times, and a side network has one place beside each block"
    if len(called.shape) != 3:
        return f"what it puts out has the shape {list(called.shape)}, and not (rows, tokens, width)"
    if any(h.causal is None for h in heads):
        return "its attention mask could not be read: nobody knows which tokens may see which"
    return ""


def network(chosen: Sequence[Site], ends: Ends, reads: bool) -> list[Site]:
    """The sites of the side networks beside some blocks, one for each stack: where it begins, its rungs, its end.

    One that ends `late` does so in front of the last block, beside which there is no rung.  With `reads`, a decoder's
    reads that of the encoder, where both have one.
    """
    stacks: dict[str, list[Site]] = {}
    for site in chosen:
        if site.block is not None and not (ends == "late" and site.path == site.block.last):
            stacks.setdefault(site.block.stack, []).append(site)
    crossing = [s for s, rungs in stacks.items() if reads and _block_of(rungs[0]).cross is not None]
    memory = next((s for s in stacks if s not in crossing), None) if crossing and len(stacks) == 2 else None
    found: list[Site] = []
    for stack, rungs in stacks.items():
        if memory is not None and stack in crossing:
            width = _block_of(stacks[memory][0]).width
            rungs = [replace(s, block=replace(_block_of(s), memory=width)) for s in rungs]
        first = _block_of(rungs[0])
        end: SidePart = "memory" if stack == memory else ends
        place = {"late": first.last, "head": first.head[0] if first.head else first.end}.get(end, first.end)
        found += [_at(rungs[0], first.first, "entry"), *rungs, _at(rungs[0], place, end)]
    return found


def _block_of(site: Site) -> Block:
    assert site.block is not None
    return site.block


def _at(site: Site, path: str, part: SidePart) -> Site:
    """Another place of the same network."""
    return replace(site, place=replace(site.place, path=path, tensor=part), part=part, roles=(part,))
