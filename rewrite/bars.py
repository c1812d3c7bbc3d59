"""Memory as stacked bars, one for each way to train a model."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

from rewrite.table import size

_COLOURS = ("#3d6da8", "#86a9d4", "#b9cde6", "#b3590b", "#e39a55", "#f1c79c", "#0d7a63", "#6db9a6")
_WIDTH = 34  # characters of a label's line


def picture(title: str, bars: Sequence[tuple[str, Mapping[str, int]]]) -> bytes:
    """A PNG: a bar for each (label, {part: bytes}), all on one scale; parts of one name have one colour."""
    from matplotlib.figure import Figure  # takes half a second to load

    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    totals = [sum(parts.values()) for _, parts in bars]
    unit, divisor = _unit(max(totals, default=0))
    figure = Figure(figsize=(9, 1.9 + 0.7 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (_, parts) in enumerate(bars):
        start = 0.0
        for name, count in parts.items():
            key = None if name in axes.get_legend_handles_labels()[1] else name
            axes.barh(row, count / divisor, left=start, color=colours[name], edgecolor="white", label=key)
            start += count / divisor
        axes.text(start, row, f" {size(totals[row])}", va="center", fontsize=9)
    labels = ["\n".join(textwrap.wrap(label or "as it is", _WIDTH)) for label, _ in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set(xlabel=unit, title=title, xlim=(0, 1.15 * max(totals, default=1) / divisor or 1))
    axes.invert_yaxis()
    axes.spines[["left", "right", "top"]].set_visible(False)
    if names:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _unit(largest: float) -> tuple[str, float]:
    """The binary unit in which a number of bytes is at least 1."""
    units, number = ("B", "KiB", "MiB", "GiB", "TiB"), 0
    while largest >= 1024 ** (number + 1) and number + 1 < len(units):
        number += 1
    return units[number], float(1024**number)
