"""HRA."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner, table


class HraTuner(Tuner):
    """Householder reflections."""

    type = "HRA"
    methods = ("hra",)
    kinds = frozenset({"linear", "conv2d"})
    arguments = table({"r": ("r", 8)})
    honours = frozenset()  # PEFT takes the first of the sizes of each side for all
    starts = frozenset({"init_weights"})
    only = table({"apply_GS": ((), "reflections that are made orthogonal are not among the methods of rewrite")})
    bias_only = "hra_only"
    tensors = table({"U": "hra_u"})
