"""What was aimed at on a GPU, beside what was measured.

python benchmarks/targets.py results/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rewrite.table import table

Data = Mapping[str, Any]


class Target(NamedTuple):
    """A ratio of a part at some tokens: the time of `peer` over ours at least, or our saved bytes over its at most."""

    part: str
    tokens: int
    peer: str
    least: float | None = None
    most: float | None = None


TARGETS = (
    Target("lora", 8192, "peft, compiled", least=1.15),
    Target("lora", 8192, "unsloth's path", least=1.05),
    Target("dropout", 8192, "peft, compiled", least=1.3),
    Target("qlora", 2048, "peft + bitsandbytes", least=1.2),
    Target("qlora", 128, "peft + bitsandbytes", least=2.0),
    Target("dora", 8192, "peft", least=1.8),
    Target("steps", 8192, "unsloth's path", most=0.9),
)


def judged(data: Data) -> str:
    """A table of the targets."""
    rows = [("target", "aim", "measured", "quartiles", "met", "checked")]
    for target in TARGETS:
        what = "saved bytes over" if target.most else "faster than"
        name = f"{target.part}, {target.tokens} tokens, {what} {target.peer}"
        aim = f"<= {target.most}" if target.most else f">= {target.least}"
        rows.append((name, aim, *_measured(target, data)))
    states = [(name, part["state"]) for name, part in data["parts"].items()]
    return "\n".join([*table(rows, right={1, 2}), "", *table([("part", "state"), *states]), ""])


def _measured(target: Target, data: Data) -> tuple[str, str, str, str]:
    result = _result(target, data)
    rows = result.get("rows", {}) if result else {}
    ours, peer = rows.get("rewrite", {}), rows.get(target.peer, {})
    if not ours or not peer:
        return "not measured", "", "", ""
    for name, row in (("rewrite", ours), (target.peer, peer)):
        if row.get("failure"):
            return f"{name}: {row['failure'][:60]}", "", "", ""
    checked = "yes" if ours["passed"] and peer["passed"] else "FAILED"
    if target.most:
        ratio = ours["saved_bytes"] / peer["saved_bytes"]
        return f"{ratio:.3f}", "", "yes" if ratio <= target.most else "no", checked
    pair = result["ratios"].get("step", {}).get("over ours", {}).get(target.peer) if result else None
    if not pair or target.least is None:
        return "not timed", "", "", checked
    met = "yes" if pair["median"] >= target.least else "no"
    return f"{pair['median']:.3f}", f"{pair['low']:.3f} .. {pair['high']:.3f}", met, checked


def _result(target: Target, data: Data) -> Data | None:
    """The case of a target: of its part, with its tokens."""
    results = data["parts"].get(target.part, {}).get("results", ())
    return next((r for r in results if r["case"]["tokens"] == target.tokens), None)


if __name__ == "__main__":
    print(judged(json.loads(Path(sys.argv[1]).read_text())))
