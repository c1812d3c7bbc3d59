"""C3A."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner, table


class C3aTuner(Tuner):
    """Circulant blocks."""

    type = "C3A"
    methods = ("c3a",)
    arguments = table({"block_size": ("block_size", 256)})
    patterns = table({"block_size": "block_size_pattern"})
    dotted = True
    starts = frozenset({"init_weights"})
    bias_only = "c3a_only"
    tensors = table({"w": "c3a_kernel"})
