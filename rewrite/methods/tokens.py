"""Trainable tokens: some rows of an embedding, or of a head, are replaced by trained copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site


@dataclass(frozen=True)
class Tokens(Method):
    """W[ids]  ->  trained, the other rows frozen; where a head shares the weight of an embedding, both follow."""

    ids: tuple[int, ...] = arg((), low=0, help="the rows, by token id")

    kinds = frozenset({"linear", "embedding"})

    def check(self) -> str | None:
        """Why these arguments do not go together, or None."""
        if not self.ids or len(set(self.ids)) < len(self.ids):
            return "name the rows, each once: ids=(3, 7)"
        return None

    def fits(self, site: Site) -> str | None:
        rows = site.in_features if site.kind == "embedding" else site.out_features
        return f"it has {rows} rows, none with the id {max(self.ids)}" if max(self.ids) >= rows else None

    def params(self, site: Site) -> dict[str, Param]:
        width = site.out_features if site.kind == "embedding" else site.in_features
        name = "E" if site.kind == "embedding" else "H"  # a token is a column of the matrix of an embedding
        at = Param((len(self.ids),), lambda t: t.copy_(torch.tensor(self.ids)), trainable=False, dtype=torch.int64)
        return {name: Param((len(self.ids), width)), "at": at}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        if "E" in theta:
            theta["E"].copy_(W[:, theta["at"]].T)
        else:
            theta["H"].copy_(W[theta["at"]])

    def weight(self, W: Tensor, at: Tensor, **rows: Tensor) -> Tensor:
        dim, new = (-1, rows["E"].transpose(0, 1)) if "E" in rows else (-2, rows["H"])
        return torch.index_copy(W, dim, at.to(torch.int64), new.to(W.dtype))
