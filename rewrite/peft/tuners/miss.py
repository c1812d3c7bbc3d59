"""MISS: as it is, in its small form, or as Bone (`bat`)."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Kind, Part, Tuner, table


class MissTuner(Tuner):
    """One shard for all pieces of the input."""

    type = "MISS"
    methods = ("miss", "bone")
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
            return "bone", {"r": given["r"]}
        return name, given | {"mini": config.get("mini_r", 1) if form == "mini" else None}

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        if method.name == "bone":
            return {"r": method.r, "init_weights": "bat"}
        form = {"init_weights": "mini", "mini_r": method.mini} if method.mini else {"init_weights": True}
        return super().fields(method, part) | form

    def fits(self, method: Any, part: Part) -> str | None:
        sizes = part.graft.shape
        uneven = method.name == "bone" and any(size % method.r for size in sizes)
        return f"PEFT's blocks of {method.r} must fill a weight, {tuple(sizes)} is not" if uneven else None
