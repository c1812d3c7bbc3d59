"""Dotted paths of modules and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def joined(path: str, name: str) -> str:
    """The path of a child or a tensor; the root's own have no dot."""
    return f"{path}.{name}" if path else name


def upwards(path: str) -> Iterator[str]:
    """A path and all that contain it, but for the root."""
    while path:
        yield path
        path = parent(path)


def list_of(path: str, lists: Iterable[str]) -> str:
    """The first of these lists of modules that a path is in, '' for none."""
    return next((p for p in lists if path.startswith(f"{p}.")), "")


def element_of(path: str, lists: Iterable[str]) -> str:
    """The element of a list of modules that a path is, or is in: `layers.3.mlp` -> `layers.3`; '' for none."""
    owner = list_of(path, lists)
    return f"{owner}.{path[len(owner) + 1 :].partition('.')[0]}" if owner else ""
