"""What sites a model has, as a table: `rewrite.sites(model)`, `rewrite.plan(model, "attn.q")`, `plan --sites`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewrite.inventory import Inventory
from rewrite.parser import parse_sites
from rewrite.passes.record import summarise
from rewrite.planning import Plan
from rewrite.selection import Selection
from rewrite.sites import SIDES, Site
from rewrite.table import table


@dataclass(frozen=True)
class SiteMap(Plan):
    """A plan that places nothing: the sites that a selector names in a model, or all of them.

    Prints as a table grouped over layers.

    >>> sites(model)                                 # doctest: +SKIP
    """

    chosen: tuple[Site, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.chosen

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per site: its name, all words that select it, layer and shape of its matrix."""
        return [
            {
                "site": s.name,
                "roles": list(s.roles),
                "kind": s.kind,
                "layer": s.layer,
                "shape": list(shape_of(s)),
            }
            for s in self.sites
        ]

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[Site]] = {}
        for site in self.sites:
            # `dec.attn.q` goes without saying next to `attn.q` and `dec`.
            also = [w for w in site.roles[1:] if w.partition(".")[0] not in SIDES or w in SIDES]
            groups.setdefault((site.roles[0], " ".join(also)), []).append(site)
        rows = [("role", "where", "sites", "shape", "also")]
        for (role, also), group in groups.items():
            shapes = dict.fromkeys(shape_of(s) for s in group)
            text = " ".join("x".join(map(str, shape)) for shape in shapes)
            rows.append((role, summarise([s.name for s in group]), str(len(group)), text, also))
        head = f"{self.model}: {len(self)} sites" + (f" at {self.spec}" if self.spec else "")
        return "\n".join([head, "", *table(rows, right={2}), *(f"note: {n}" for n in self.notes)])

    __repr__ = __str__


def shape_of(site: Site) -> tuple[int, ...]:
    """(experts, d_out, d_in) of a site, (d_out, d_in) of a single matrix, the shape itself of a vector."""
    vector = len(site.place.matrix) < 2
    return site.place.matrix if vector else (*site.leading, site.out_features, site.in_features)


def site_map(inventory: Inventory, text: str = "", parameters: int = 0) -> SiteMap:
    """The sites of a model that `text` selects, as it would after an `@`; raises `SpecError` or `ResolveError`."""
    selection = Selection(inventory, text)
    chosen = selection.select(parse_sites(text)) if text else selection.sites
    return SiteMap(inventory.model, text, (), tuple(selection.notes), parameters, chosen=tuple(chosen))
