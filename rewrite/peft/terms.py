"""A set of paths of one model as few terms of the spec language: globs where they name these paths and no others."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator

from torch import nn

from rewrite.lexer import MAX_REGEX
from rewrite.spec import quoted


def universe(model: nn.Module) -> tuple[str, ...]:
    """Every name that a term may match: of modules and of parameters."""
    modules = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    return (*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False)))


def terms(paths: Iterable[str], everything: Collection[str]) -> list[str]:
    """Terms that match these paths, and of `everything` nothing else.

    >>> terms(["h.0.q", "h.1.q", "h.0.v"], ["h", "h.0", "h.0.q", "h.0.v", "h.1", "h.1.q", "h.1.v"])
    ['"*.q"', '"h.0.v"']
    """
    wanted = list(dict.fromkeys(paths))
    left, found = dict.fromkeys(wanted), list[str]()
    for path in wanted:
        if path not in left:
            continue
        term, covered = _term(path, wanted, everything)
        found.append(term)
        for name in covered:
            left.pop(name, None)
    return found


def _term(path: str, wanted: Collection[str], everything: Collection[str]) -> tuple[str, list[str]]:
    """The widest term for a path that stays inside of what is wanted, and what it covers."""
    inside = set(wanted)
    for glob in _globs(path):
        matched = [name for name in everything if fnmatch.fnmatchcase(name, glob)]
        if len(matched) > 1 and inside.issuperset(matched):
            return quoted(glob), matched
    alike = [name for name in wanted if _template(name) == _template(path)]
    if len(alike) > 1 and (regex := _numbered(alike)) is not None:
        return regex, alike
    return quoted(_escaped(path)), [path]


def _globs(path: str) -> Iterator[str]:
    """Globs for all that ends as a path does, the shortest ending first, then for its like in other layers."""
    parts = [_escaped(part) for part in path.split(".")]
    for start in range(len(parts) - 1, 0, -1):
        if not any(part.isdigit() for part in parts[start:]):
            yield "*." + ".".join(parts[start:])
    yield ".".join("*" if part.isdigit() else part for part in parts)


def _template(path: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in path.split("."))


def _numbered(paths: list[str]) -> str | None:
    """One regex for paths that differ in one number; None where they differ in more."""
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    varying = [number for number, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) != 1:
        return None
    parts = [re.escape(column[0]) for column in columns]
    parts[varying[0]] = f"({'|'.join(columns[varying[0]])})"
    regex = r"\.".join(parts)
    return f"/{regex}/" if len(regex) <= MAX_REGEX and "/" not in regex else None


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
