"""A set of row numbers as one regular pattern: a slice, or the same slice of every head."""

from __future__ import annotations

from collections.abc import Sequence

from rewrite.codegen.maps import Rows


def regular(entries: Sequence[int], width: int) -> Rows | None:
    """The `Rows` of a matrix with `width` rows that are exactly `entries`; None where they follow no such pattern.

    >>> regular([4, 5, 10, 11], 12)
    Rows(count=2, start=4, stop=6, stride=6)
    >>> regular([0, 1, 5], 12) is None
    True
    """
    rows = sorted(set(entries))
    starts = [n for i, n in enumerate(rows) if i == 0 or rows[i - 1] != n - 1]
    if not rows or width % len(starts):
        return None
    count, start = len(starts), starts[0]
    stride, length = width // count, len(rows) // count
    if not 0 <= start < start + length <= stride:
        return None
    found = Rows(count, start, start + length, stride)
    return found if found.indices() == rows else None
