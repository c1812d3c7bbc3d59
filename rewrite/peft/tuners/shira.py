"""SHIRA: the file holds the places."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner


class ShiraTuner(Tuner):
    """A few entries of the weight."""

    type = "SHIRA"
    methods = ("shira",)
    arguments = {"r": ("r", 32), "seed": ("random_seed", None)}
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    only = {"mask_type": (("random",), "rewrite has the random mask of PEFT")}
    tensors = {"v": "shira_weight", "at": "shira_indices"}
