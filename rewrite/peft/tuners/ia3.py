"""IA3: a factor for every channel of the output, or of the input of feed-forward layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewrite.methods.ia3 import Ia3
from rewrite.peft.config import Config
from rewrite.peft.targets import Target, full_match
from rewrite.peft.tuner import SIDES, Call, Key, Kind, Part, Tuner, shaped


class Ia3Tuner(Tuner):
    """y l, or (x l) W for feed-forward layers."""

    type = "IA3"
    methods = ("ia3",)
    kinds = frozenset({"linear", "conv2d", "conv3d"})
    honours = SIDES | {"groups", "dilation", "padding_mode"}
    transposed = True
    starts = frozenset({"init_ia3_weights", "fan_in_fan_out"})
    extra = frozenset({"feedforward_modules"})

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        names = config.get("feedforward_modules")
        if names is None:
            raise config.refuse("feedforward_modules", "name the feed-forward modules, or [] for none")
        if target is None:
            if names:
                raise config.refuse("feedforward_modules", "which modules these are takes the model: pass it")
            return "ia3", {}
        if isinstance(names, str):
            forward = full_match(names, target.path, config, "feedforward_modules")
        else:
            forward = target.path.endswith(tuple(names))  # PEFT compares ends of names, dot or not
        return "ia3", {"scales": "input" if forward else "output"}

    def keys(self, method: Ia3, part: Part) -> list[Key]:
        size = part.shape("v")[0]
        if part.kernel:
            return [shaped("v", "ia3_l", part, (1, size, *(1,) * len(part.kernel)))]
        return [shaped("v", "ia3_l", part, (1, size) if method.scales == "input" else (size, 1))]

    def fields(self, method: Ia3, part: Part) -> dict[str, Any]:
        return {}

    def finish(self, config: dict[str, Any], made: Sequence[tuple[Ia3, Part]]) -> None:
        # One regular expression: a list must repeat names of target_modules, and these may mean both.
        paths = [re.escape(part.path) for method, part in made if method.scales == "input"]
        config["feedforward_modules"] = "|".join(paths) if paths else []
