"""Sites: named places in the function.  Which role a place has follows from structure, with names as a tie-break.

A block is an element of a repeated list.  Inside one, what shares a module with query, key and value projections
is attention; every other projection is feed-forward, told apart by its shape.  `HINTS` is the only table of
names; an architecture is never mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rewrite.inventory import Inventory, Place

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
    }.items()
}
# Fused projections whose output is query, key and value one after the other, each a third.
THIRDS = re.compile(r"(?:^|\.)(?:c_attn|qkv)$", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A place in the function that a method can stand at.

    `roles` are all the words that select it, the narrowest first.  `rows` is the part of a fused output that
    the site is, None for all of it.  `layer` counts within `stack`, the list of blocks that it is in.
    """

    place: Place
    roles: tuple[str, ...]
    rows: tuple[int, int] | None = None
    stack: str | None = None
    layer: int | None = None

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
    def in_features(self) -> int:
        return self.place.shape[min(1, len(self.place.shape) - 1)]

    @property
    def out_features(self) -> int:
        return self.place.shape[0] if self.rows is None else self.rows[1] - self.rows[0]

    @property
    def name(self) -> str:
        """Path with the part of it, where the site is a part: `h.0.attn.c_attn[q]`."""
        return self.path if self.rows is None else f"{self.path}[{self.roles[0].rpartition('.')[2]}]"


def find(inventory: Inventory) -> list[Site]:
    """Every site of a model, in the model's order."""
    finder = _Finder(inventory)
    return [site for place in inventory.places for site in finder.sites(place)]


class _Finder:
    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.linears = [p for p in inventory.places if p.kind == "linear" and p.called]
        self.attention = {_parent(p.path) for p in self.linears if self.where(p.path)[0] and _hint(p.path, "q", "qkv")}

    def where(self, path: str) -> tuple[str | None, int | None, str]:
        """(list of blocks, number in it, path inside the block) of a module."""
        for stack in self.inventory.blocks:
            if path.startswith(f"{stack}."):
                number, _, inside = path[len(stack) + 1 :].partition(".")
                if number.isdigit():
                    return stack, int(number), inside
        return None, None, path

    def sites(self, place: Place) -> Iterator[Site]:
        stack, layer, _ = self.where(place.path)
        for roles, rows in self.roles(place):
            yield Site(place, (*roles, *_in_stack(roles, place.path, stack)), rows, stack, layer)

    def roles(self, place: Place) -> Iterator[tuple[tuple[str, ...], tuple[int, int] | None]]:
        """(roles, rows) of each site at a place."""
        if place.kind == "norm":
            yield ("norm",), None
        elif place.kind == "embedding":
            yield (("embed",) if self.where(place.path)[0] is None else ("other",)), None
        elif place.kind == "conv":
            yield ("conv",), None
        elif place.kind != "linear" or not place.called:
            yield ("other",), None
        elif self.is_head(place):
            # A tied head is the embedding's matrix: `linear` and `base` leave it alone.
            yield (("head",) if place.tied else ("head", "linear")), None
        else:
            yield from self.projection(place)

    def is_head(self, place: Place) -> bool:
        if self.inventory.head is not None and place.path == self.inventory.head:
            return True
        return self.where(place.path)[0] is None and bool(_hint(place.path, "head"))

    def projection(self, place: Place) -> Iterator[tuple[tuple[str, ...], tuple[int, int] | None]]:
        stack, layer, _ = self.where(place.path)
        general = ("linear", "base")
        if stack is None:
            yield general, None
            return
        scope = self.attention_scope(place.path, f"{stack}.{layer}")
        if scope is None:
            yield (f"ffn.{self.feed_forward(place, f'{stack}.{layer}')}", "ffn", *general), None
            return
        part = _hint(place.path, "q", "k", "v", "qkv") or "o"
        cross = ("cross." + part, "cross") if self.is_cross(scope, f"{stack}.{layer}") else ()
        if part == "qkv":
            yield (*cross[:1], "attn.qkv", *general), None
            yield from self.thirds(place, bool(cross))
        else:
            yield (*cross[:1], f"attn.{part}", *cross[1:], "attn", *general), None

    def thirds(self, place: Place, cross: bool) -> Iterator[tuple[tuple[str, ...], tuple[int, int]]]:
        size = place.shape[0] // 3
        if not THIRDS.search(place.path) or place.shape[0] != 3 * place.shape[1]:
            return  # another layout: only the whole projection is a site
        for i, part in enumerate("qkv"):
            extra = (f"cross.{part}", "cross") if cross else ()
            yield (f"attn.{part}", "attn", *extra), (i * size, (i + 1) * size)

    def attention_scope(self, path: str, block: str) -> str | None:
        """The attention module, inside its block, that a projection belongs to."""
        scope = _parent(path)
        while scope.startswith(f"{block}."):
            inside = [a for a in self.attention if a == scope or a.startswith(f"{scope}.")]
            if inside:
                return inside[0]
            if _parent(scope) in self.inventory.lists:  # an element of a list does not speak for the others
                return None
            scope = _parent(scope)
        return block if block in self.attention and path in self._direct_attention(block) else None

    def _direct_attention(self, block: str) -> set[str]:
        """Projections of a block that holds query, key and value itself, without an attention module."""
        return {p.path for p in self.linears if _parent(p.path) == block and _hint(p.path, "q", "k", "v", "qkv")}

    def is_cross(self, scope: str, block: str) -> bool:
        inside = scope.removeprefix(block)
        return any(HINTS["cross"].search(part) for part in inside.split(".") if part)

    def feed_forward(self, place: Place, block: str) -> str:
        """up, gate or down: by the shape, and for a square projection by whether it is the block's last."""
        rows, columns = place.shape[:2]
        if rows < columns:
            return "down"
        if _hint(place.path, "gate"):
            return "gate"
        last = [p.path for p in self.linears if p.path.startswith(f"{block}.")][-1]
        return "down" if rows == columns and place.path == last else "up"


def _in_stack(roles: Iterable[str], path: str, stack: str | None) -> list[str]:
    """The same roles inside the encoder or the decoder, for models that have them."""
    parts = (stack or path).split(".")
    side = next((s for s in ("enc", "dec") if any(HINTS[s].search(part) for part in parts)), None)
    return [f"{side}.{role}" for role in roles] + [side] if side else []


def _hint(path: str, *roles: str) -> str | None:
    return next((role for role in roles if HINTS[role].search(path)), None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
