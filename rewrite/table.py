"""Plain-text tables, and the units that stand in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows as aligned lines, the first one as the heading; the columns in `right` are numbers.

    >>> print("\\n".join(table([("method", "sites"), ("lora", "64")], right={1})))
    method  sites
    ------  -----
    lora       64
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return [line.rstrip() for line in lines]


def size(count: float) -> str:
    """Bytes in binary units, with three significant digits.

    >>> [size(n) for n in (0, 512, 34_560, 13.55 * 2**30)]
    ['0 B', '512 B', '33.8 KiB', '13.6 GiB']
    """
    return f"{count:,.0f} B" if count < 999.5 else _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def flops(count: float) -> str:
    """Floating-point operations in decimal units, with three significant digits.

    >>> flops(2_506_752)
    '2.51 MFLOP'
    """
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def duration(seconds: float) -> str:
    """A time in seconds or a smaller unit, with three significant digits.

    >>> [duration(t) for t in (12.5, 0.0441, 3e-5)]
    ['12.5 s', '44.1 ms', '0.0300 ms']
    """
    return f"{_digits(seconds)} s" if seconds >= 0.9995 else f"{_digits(seconds * 1e3)} ms"


def share(part: float, whole: float) -> str:
    """A part as a percentage.

    >>> share(1_792, 74_560)
    '2.403%'
    """
    return f"{part / whole:.3%}" if whole else "0.000%"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    number = 0
    while value >= 999.5 and number + 1 < len(units):
        value, number = value / step, number + 1
    return f"{_digits(value)} {units[number]}"


def _digits(value: float) -> str:
    if not value:
        return "0"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")
