"""DELORA."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner, table


class DeloraTuner(Tuner):
    """Normalised directions; what PEFT calls module_dropout drops inputs of the branch."""

    type = "DELORA"
    methods = ("delora",)
    arguments = table({"r": ("r", 8), "strength": ("delora_lambda", 15), "dropout": ("module_dropout", 0.0)})
    patterns = table({"r": "rank_pattern", "delora_lambda": "lambda_pattern"})
    starts = frozenset({"init_weights"})
    bias_only = "delora_only"
    tensors = table({"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "w": "delora_w_norm"})
