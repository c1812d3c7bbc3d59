"""LOKR."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import SIDES, Call, Key, Kind, Part, Tuner, reordered, shaped, table
from rewrite.peft.tuners.loha import DROPOUT, TUCKER


class LokrTuner(Tuner):
    """C (x) (B A), either side whole or factored."""

    type = "LOKR"
    methods = ("lokr",)
    kinds = frozenset({"linear", "conv2d"})  # PEFT 0.21 takes another product for Conv1d, or fails
    honours = SIDES | {"groups", "dilation"}
    arguments = table(
        {
            "r": ("r", 8),
            "alpha": ("alpha", 8),
            "factor": ("decompose_factor", -1),
            "both": ("decompose_both", False),
            "tucker": (TUCKER, False),
        }
    )
    patterns = table({"r": "rank_pattern", "alpha": "alpha_pattern"})
    starts = frozenset({"init_weights"})
    only = table({"rank_dropout": DROPOUT, "module_dropout": DROPOUT, "rank_dropout_scale": DROPOUT})

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        name, given = super().call(config, target, kind)
        return name, given | {"factor": None if given["factor"] == -1 else given["factor"]}

    def keys(self, method: Any, part: Part) -> list[Key]:
        found = [Key("C", "lokr_w1"), Key("C2", "lokr_w1_a"), Key("C1", "lokr_w1_b")]
        if "M" in part.graft.slots:
            rows = part.shape("M")[0]
            found.append(shaped("M", "lokr_w2", part, (rows, -1, *part.kernel) if part.kernel else part.shape("M")))
        tucker = "T" in part.graft.slots
        found += [reordered("B", "lokr_w2_a") if tucker else Key("B", "lokr_w2_a"), Key("A", "lokr_w2_b")]
        if tucker:
            found.append(shaped("T", "lokr_t2", part, (method.r, method.r, *(*part.kernel, 1)[:2])))
        return [key for key in found if key.slot in part.graft.slots]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        found = super().fields(method, part) | {"alpha": method.r if method.alpha is None else method.alpha}
        return found | {"decompose_factor": -1 if method.factor is None else method.factor}
