"""Sites: named places in the function.  Which role a place has follows from what the model computes.

`rewrite.structure` says what a forward does with every weight; this module turns that into the words of a spec
(docs/sites.md).  Where no forward could be recorded, and for projections that the graph says nothing about, names
decide: `HINTS` is the only table of names, and an architecture is never mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from rewrite.blocks import Block, SidePart, described
from rewrite.codegen.maps import LINEAR, Rows
from rewrite.entry import Entry
from rewrite.inventory import Inventory, Place
from rewrite.paths import element_of, parent, upwards
from rewrite.structure.roles import Part, Use
from rewrite.structure.rows import regular

HINTS: dict[str, re.Pattern[str]] = {
    role: re.compile(rf"(?:^|\.)(?:{names})$", re.IGNORECASE)
    for role, names in {
        "q": r"q|q_proj|query|q_lin|wq|to_q|query_proj|q_linear|linear_q|query_layer",
        "k": r"k|k_proj|key|k_lin|wk|to_k|key_proj|k_linear|linear_k|key_layer",
        "v": r"v|v_proj|value|v_lin|wv|to_v|value_proj|v_linear|linear_v|value_layer",
        "qkv": r"c_attn|qkv|qkv_proj|wqkv|query_key_value|in_proj_qkv",
        "gate": r"gate|gate_proj|w1|wi_0|linear_gate",
        "head": r"lm_head|head|classifier|score|qa_outputs|embed_out|output_projection|cls_head",
        "cross": r"encdecattention|crossattention|cross_attn|encoder_attn|cross_attention|attn2|cross",
        "enc": r"encoder|enc",
        "dec": r"decoder|dec",
        "text": r"text_model|language_model|text_encoder|text",
        "vision": r"vision_model|vision_tower|visual|vision_encoder|image_encoder|vision",
        "audio": r"audio_model|audio_tower|audio_encoder|audio",
    }.items()
}
SIDES = ("enc", "dec", "text", "vision", "audio")

Found = tuple[tuple[str, ...], Rows | None]


@dataclass(frozen=True)
class Site:
    """A place in the function that a method can stand at.

    `roles` are all the words that select it, the narrowest first.  `rows` is the part of a fused output that
    the site is, None for all of it.  `layer` counts within `stack`, the list of blocks that it is in.
    """

    place: Place
    roles: tuple[str, ...]
    rows: Rows | None = None
    stack: str | None = None
    layer: int | None = None
    shared: bool = False  # one adapter for all places that share its weight
    entry: Entry | None = None  # of the tokens of the whole model, where the site is that
    head: int | None = None  # rows of one head of an attention; columns of one, where the site joins its heads
    block: Block | None = None  # what a side network must know, where the site is a block
    part: SidePart = "rung"  # of a side network

    @property
    def path(self) -> str:
        return self.place.path

    @property
    def kind(self) -> str:
        return self.place.kind

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the stack of matrices that its weight is: (experts,), or () for a single one."""
        return self.place.matrix[:-2]

    @property
    def in_features(self) -> int:
        return (1, *self.place.matrix)[-1]

    @property
    def out_features(self) -> int:
        return len(self.rows) if self.rows is not None else (*self.place.matrix[-2:], 1)[0]

    @property
    def outputs(self) -> int:
        """Channels of the layer's output that belong to the site: the length of a bias."""
        return self.place.map.outputs(self.out_features)

    @property
    def inputs(self) -> int:
        """Channels of the layer's input."""
        return self.place.map.inputs(self.place.stored)

    @property
    def weight(self) -> str:
        """Its weight by name, without a final `.weight`: `h.0.attn.c_attn`, `layers.0.mlp.experts.down_proj`."""
        return self.path if self.place.tensor == "weight" else self.place.parameter

    @property
    def name(self) -> str:
        """Its weight with the part of it, where the site is a part: `h.0.attn.c_attn[q]`."""
        return self.weight if self.rows is None else f"{self.weight}[{self.roles[0].rpartition('.')[2]}]"


@dataclass
class Sites:
    """Every site of a model, in the model's order, and what a reader should know about how they were found."""

    sites: list[Site]
    notes: list[str] = field(default_factory=list)


def find(inventory: Inventory) -> Sites:
    """The sites of a model."""
    finder = _Finder(inventory)
    found = [site for place in inventory.places for site in finder.sites(place)]
    found += finder.repeated()
    blocks = described(inventory, found)
    return Sites([_described(s, blocks) if s.kind == "block" else s for s in found], finder.notes())


def _described(site: Site, blocks: Mapping[str, Block]) -> Site:
    block = blocks[site.path]
    return replace(site, block=block, place=replace(site.place, shape=(block.width,) if block.width else ()))


class _Finder:
    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.seen = inventory.structure
        self.stacks = _stacks(inventory)
        self.linears = [p for p in inventory.places if p.kind == "linear" and p.called]
        self.named = {parent(p.path) for p in self.linears if self.where(p.path)[0] and _hint(p.path, "q", "qkv")}
        self.routed = {self.block(path) for path, use in self.uses("router") if self.block(path)}
        self.embeddings = {p.path for p in inventory.places if p.kind == "embedding"}
        self.disagreements: list[str] = []
        self.unreached = 0

    def use(self, place: Place) -> Use | None:
        """How the recorded forward uses the weight of a place."""
        return self.seen.uses.get(place.parameter) if self.seen else None

    def uses(self, role: str) -> Iterator[tuple[str, Use]]:
        for name, use in self.seen.uses.items() if self.seen else ():
            if any(part.role == role for part in use.parts):
                yield name, use

    def notes(self) -> list[str]:
        found = []
        if self.inventory.untraced:
            found.append(
                f"roles go by names and shapes: no forward of this {self.inventory.model} could be recorded "
                f"({self.inventory.untraced}); pass a batch, inputs={{...}}"
            )
        if self.seen and self.unreached:
            found.append(
                f"{self.unreached} projections were not reached by the recorded forward: their roles go by names; "
                "a batch that reaches them, inputs={...}, tells more"
            )
        for text in self.disagreements[:3]:
            found.append(text)
        if len(self.disagreements) > 3:
            found.append(f"... and {len(self.disagreements) - 3} more names that the graph disagrees with")
        return found

    # --- where a place is ---

    def where(self, path: str) -> tuple[str | None, int | None]:
        """(stack, layer) of a module."""
        return self.stacks.get(self.block(path), (None, None))

    def block(self, path: str) -> str:
        """Path of the block that a module is in, '' for none."""
        return element_of(path, self.inventory.blocks)

    # --- roles ---

    def sites(self, place: Place) -> Iterator[Site]:
        stack, layer = self.where(place.path)
        entry = self.inventory.entry
        if entry is not None and place.kind == "embedding" and place.path == entry.path:
            yield Site(replace(place, kind="tokens", map=LINEAR, tied=()), ("input",), None, stack, layer, entry=entry)
        for roles, rows in self.roles(place):
            words = (*roles, *_in_stack(roles, place.path, stack))
            yield Site(place, words, rows, stack, layer, head=self.head(place, roles))
        if place.kind == "embedding" and place.tied:
            # As the head applies it, so that both its readers take the same update.
            both = replace(place, kind="linear", map=LINEAR, shape=place.stored, called=False)
            yield Site(both, ("tied",), None, stack, layer, shared=True)

    def repeated(self) -> Iterator[Site]:
        """A site for every block, which has no weight of its own: what is in it are sites too."""
        inside: dict[str, Place] = {}
        for place in self.inventory.places:
            inside.setdefault(self.block(place.path), place)
        for path, (stack, layer) in self.stacks.items():
            words = ("blocks", "block")
            place = Place(path, "", "block", (), inside[path].dtype, ())
            yield Site(place, (*words, *_in_stack(words, path, stack)), None, stack, layer)

    def head(self, place: Place, roles: tuple[str, ...]) -> int | None:
        """How many channels of a projection belong to one head of an attention, where the site is of one."""
        use = self.use(place)
        return next((p.head for p in use.parts if p.role in roles), None) if use is not None else None

    def roles(self, place: Place) -> Iterator[Found]:
        """(roles, rows) of each site at a place."""
        if place.kind == "norm":
            yield ("norm",), None
        elif place.kind == "embedding":
            yield (("embed",) if self.where(place.path)[0] is None else ("other",)), None
        elif place.kind == "conv":
            use = self.use(place)
            yield from self.by_graph(place, use) if use is not None and use.parts else [(("conv",), None)]
        elif place.kind == "linear" and self.is_head(place):
            # A tied head is the embedding's matrix: `linear` and `base` leave it alone.
            yield (("head",) if place.tied else ("head", "linear")), None
        elif place.kind in ("linear", "expert"):
            use = self.use(place)
            self.unreached += use is None and self.where(place.path)[0] is not None
            yield from self.by_graph(place, use) if use is not None else self.by_name(place)
        else:
            yield ("other",), None

    def is_head(self, place: Place) -> bool:
        if any(path in self.embeddings for path in place.tied):
            return True
        if self.inventory.head is not None:
            return place.path == self.inventory.head
        if self.where(place.path)[0] is not None:
            return False
        heads = {name for name, _ in self.uses("head")}
        return place.parameter in heads or bool(_hint(place.path, "head"))

    def by_graph(self, place: Place, use: Use) -> Iterator[Found]:
        """Roles of a projection that was seen at work."""
        general = {"linear": ("linear", "base"), "conv": ("conv",)}.get(place.kind, ("base",))
        parts = [
            p for p in use.parts if p.role != "head" and (self.where(place.path)[0] or not p.role.startswith("ffn"))
        ]
        if any(p.role == "router" for p in parts):
            yield ("router",), None
            return
        self.compare(place, parts)
        sliced = [(p, self.rows(p, place)) for p in parts]
        whole = [p for p, rows in sliced if rows is None]
        slices = [(p, rows) for p, rows in sliced if rows is not None]
        if slices:
            fused = ("ffn.gate_up",) if all(p.role.startswith("ffn") for p, _ in slices) else ("attn.qkv",)
            cross = ("cross.qkv",) if all(p.cross for p, _ in slices) else ()
            yield (*cross, *fused, *general), None
        elif whole:
            words = dict.fromkeys(w for p in whole for w in self.words(place, p))
            yield (*words, *general), None
        else:
            yield (*self.around(place), *general), None
        for part, rows in slices:
            yield self.words(place, part), rows

    def words(self, place: Place, part: Part) -> tuple[str, ...]:
        """The words for one role, narrowest first."""
        group, _, leaf = part.role.partition(".")
        if group == "attn":
            return (f"cross.{leaf}", f"attn.{leaf}", "cross", "attn") if part.cross else (part.role, "attn")
        expert = place.kind == "expert" or self.is_expert(place.path)
        return (f"ffn.experts.{leaf}", part.role, "ffn.experts", "ffn") if expert else (part.role, "ffn")

    def rows(self, part: Part, place: Place) -> Rows | None:
        if part.entries is None:
            return None
        return regular(part.entries, place.matrix[-2])

    def around(self, place: Place) -> tuple[str, ...]:
        """Words for a projection without a role of its own: those of the mixer that it stands in."""
        assert self.seen is not None
        owner = next((p for p in upwards(place.path) if p in self.seen.attention), None)
        if owner is not None and self.block(owner) != owner:
            return ("cross", "attn") if self.seen.attention[owner] else ("attn",)
        block = self.block(place.path)
        inside = [p for p in upwards(place.path) if block and p.startswith(f"{block}.")]
        if not any(p in self.seen.mixers for p in inside):
            return ()
        part = _hint(place.path, "q", "k", "v")
        return (f"attn.{part}", "attn", "mixer") if part else ("mixer",)

    def is_expert(self, path: str) -> bool:
        """Whether a module stands in a list of alike ones, inside a block that routes."""
        block = self.block(path)
        inside = [p for p in upwards(path) if p.startswith(f"{block}.")]
        return block in self.routed and any(parent(p) in self.inventory.lists for p in inside)

    def compare(self, place: Place, parts: list[Part]) -> None:
        """Note where a name says another role than the graph, which wins."""
        said, found = _hint(place.path, "q", "k", "v"), [p.role for p in parts if p.role.startswith("attn.")]
        if said and found and f"attn.{said}" not in found:
            self.disagreements.append(f"{place.path} is {' and '.join(found)} in the graph, whatever its name says")

    # --- names, where there is no graph ---

    def by_name(self, place: Place) -> Iterator[Found]:
        stack = self.where(place.path)[0]
        general = ("linear", "base") if place.kind == "linear" else ("base",)
        if not place.called and place.kind == "linear":
            yield ("other",), None
            return
        block = self.block(place.path)
        if stack is None or place.kind == "expert":
            yield general, None
            return
        scope = self.attention_scope(place.path, block)
        if scope is None:
            yield (f"ffn.{self.feed_forward(place, block)}", "ffn", *general), None
            return
        part = _hint(place.path, "q", "k", "v", "qkv") or "o"
        cross = self.is_cross(scope, block)
        if part == "qkv":
            yield (*(("cross.qkv",) if cross else ()), "attn.qkv", *general), None
        else:
            yield (*self.words(place, Part(f"attn.{part}", cross=cross)), *general), None

    def attention_scope(self, path: str, block: str) -> str | None:
        """The attention module, inside its block, that a projection belongs to."""
        scope = parent(path)
        while scope.startswith(f"{block}."):
            inside = [a for a in self.named if a == scope or a.startswith(f"{scope}.")]
            if inside:
                return inside[0]
            if parent(scope) in self.inventory.lists:  # an element of a list does not speak for the others
                return None
            scope = parent(scope)
        return block if block in self.named and parent(path) == block and _hint(path, "q", "k", "v", "qkv") else None

    def is_cross(self, scope: str, block: str) -> bool:
        return any(HINTS["cross"].search(part) for part in scope.removeprefix(block).split(".") if part)

    def feed_forward(self, place: Place, block: str) -> str:
        """up, gate or down: by the shape, and for a square projection by whether it is the block's last."""
        rows, columns = place.shape[:2]
        if rows < columns:
            return "down"
        if _hint(place.path, "gate"):
            return "gate"
        last = [p.path for p in self.linears if p.path.startswith(f"{block}.")][-1]
        return "down" if rows == columns and place.path == last else "up"


def _stacks(inventory: Inventory) -> dict[str, tuple[str, int]]:
    """Block -> (stack, layer); lists inside one outer list are one stack, counted through."""
    outer = [p for p in inventory.lists if not any(p.startswith(f"{q}.") for q in inventory.lists)]
    found: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for path in inventory.blocks:
        nested = next((o for o in outer if path.startswith(f"{o}.")), None)
        stack = nested if nested and sum(b.startswith(f"{nested}.") for b in inventory.blocks) > 1 else path
        numbers = sorted({int(n) for p in inventory.places if (n := _number(p.path, path)) is not None})
        for number in numbers:
            at = counts.setdefault(stack, 0) if stack != path else number
            counts[stack] = counts.get(stack, 0) + 1
            found[f"{path}.{number}"] = (stack, at)
    return found


def _number(path: str, stack: str) -> str | None:
    head = path[len(stack) + 1 :].partition(".")[0] if path.startswith(f"{stack}.") else ""
    return head if head.isdigit() else None


def _in_stack(roles: Iterable[str], path: str, stack: str | None) -> list[str]:
    """The same roles inside the encoder or the decoder, or one tower, for models that have them."""
    parts = (stack or path).split(".")
    sides = [s for s in SIDES if any(HINTS[s].search(part) for part in parts)]
    return [f"{side}.{role}" for side in sides for role in roles] + sides


def _hint(path: str, *roles: str) -> str | None:
    return next((role for role in roles if role in HINTS and HINTS[role].search(path)), None)
