"""SHIRA: the file holds the places."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner, table


class ShiraTuner(Tuner):
    """A few entries of the weight."""

    type = "SHIRA"
    methods = ("shira",)
    arguments = table({"r": ("r", 32), "seed": ("random_seed", None)})
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    only = table({"mask_type": (("random",), "rewrite has the random mask of PEFT")})
    tensors = table({"v": "shira_weight", "at": "shira_indices"})
