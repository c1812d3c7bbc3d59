"""HIRA."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tuner, shaped, table


class HiraTuner(Tuner):
    """W o (B A)."""

    type = "HIRA"
    methods = ("hira",)
    kinds = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"})
    transposed = True
    arguments = table({"r": ("r", 32), "dropout": ("hira_dropout", 0.0)})
    extra = frozenset({"rank_pattern"})  # PEFT 0.21 takes r all the same; a file that followed it does not fit
    starts = frozenset({"init_weights", "fan_in_fan_out"})

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        name, given = super().call(config, target, kind)
        if kind == "embedding":  # PEFT drops nothing there
            del given["dropout"]
        return name, given

    def keys(self, method: Any, part: Part) -> list[Key]:
        if part.kind == "embedding":
            return [Key("A", "hira_embedding_A"), Key("B", "hira_embedding_B")]
        if not part.kernel:
            return [Key("A", "hira_A"), Key("B", "hira_B")]
        ones = (1,) * len(part.kernel)
        A, B = (method.r, -1, *part.kernel), (*part.shape("B"), *ones)
        return [shaped("A", "hira_A", part, A), shaped("B", "hira_B", part, B)]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        found = super().fields(method, part)
        return {"r": found["r"]} if part.kind == "embedding" else found
