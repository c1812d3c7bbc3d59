"""VBLORA: one bank of vectors for all layers."""

from __future__ import annotations

from typing import Any

from rewrite.peft.tuner import Key, Part, Tuner, table


class VbloraTuner(Tuner):
    """Low-rank factors out of a bank of vectors."""

    type = "VBLORA"
    methods = ("vblora",)
    transposed = True
    arguments = table(
        {
            "r": ("r", 4),
            "vectors": ("num_vectors", 256),
            "length": ("vector_length", 256),
            "k": ("topk", 2),
            "bound": ("init_vector_bank_bound", 0.02),
            "std": ("init_logits_std", 0.1),
            "dropout": ("vblora_dropout", 0.0),
        }
    )
    starts = frozenset({"fan_in_fan_out"})
    only = table({"save_only_topk_weights": ((), "its file holds mixtures in place of logits, and cannot be trained")})
    bias_only = "vblora_only"

    def keys(self, method: Any, part: Part) -> list[Key]:
        return [
            Key("logits_A", "vblora_logits_A"),
            Key("logits_B", "vblora_logits_B"),
            Key("bank", "vblora_vector_bank", scope="model"),
        ]

    def fits(self, method: Any, part: Part) -> str | None:
        sizes = part.graft.map.matrix_shape(part.graft.shape)
        if any(size % method.length for size in sizes):
            return f"PEFT's VB-LoRA takes sizes that its vectors of {method.length} divide, not {sizes}"
        return None
