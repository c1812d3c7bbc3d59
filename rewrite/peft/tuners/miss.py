"""MISS: as it is, in its small form, or as Bone (`bat`)."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Kind, Part, Tuner, table


class MissTuner(Tuner):
    """One shard for all pieces of the input."""

    type = "MISS"
    methods = ("miss",)
    arguments = table({"r": ("r", 64), "dropout": ("miss_dropout", 0.0)})
    extra = frozenset({"init_weights", "mini_r"})
    bias_only = "miss_only"
    tensors = table({"D": "miss_block"})

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        name, given = super().call(config, target, kind)
        form = config.get("init_weights", True)
        if form not in (True, False, "bat", "mini"):
            raise config.refuse("init_weights", "it is none of true, false, bat and mini")
        if form == "bat":  # PEFT drops nothing there
            return name, {"r": given["r"], "bat": True}
        return name, given | {"mini": config.get("mini_r", 1) if form == "mini" else None}

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        found = super().fields(method, part)
        if method.bat:
            return found | {"init_weights": "bat"}
        return found | ({"init_weights": "mini", "mini_r": method.mini} if method.mini else {"init_weights": True})
