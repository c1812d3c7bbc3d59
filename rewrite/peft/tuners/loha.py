"""LOHA."""

from __future__ import annotations

from typing import Any

from rewrite.peft.tuner import SIDES, Key, Part, Tuner, reordered, shaped, table

DROPOUT = ((0, 0.0), "it drops entries of the update as a whole, which no method of rewrite does")
TUCKER = "use_effective_conv2d"


class LohaTuner(Tuner):
    """(B1 A1) o (B2 A2)."""

    type = "LOHA"
    methods = ("loha",)
    kinds = frozenset({"linear", "conv1d", "conv2d"})
    honours = SIDES | {"groups", "dilation"}
    arguments = table({"r": ("r", 8), "alpha": ("alpha", 8), "tucker": (TUCKER, False)})
    patterns = table({"r": "rank_pattern", "alpha": "alpha_pattern"})
    starts = frozenset({"init_weights"})
    only = table({"rank_dropout": DROPOUT, "module_dropout": DROPOUT})
    tensors = table({"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"})

    def keys(self, method: Any, part: Part) -> list[Key]:
        if "T1" not in part.graft.slots:
            return super().keys(method, part)
        kernel = (*part.kernel, 1)[:2]
        found = [
            reordered(slot, name) if slot.startswith("B") else Key(slot, name) for slot, name in self.tensors.items()
        ]
        shape = (method.r, method.r, *kernel)
        return [*found, shaped("T1", "hada_t1", part, shape), shaped("T2", "hada_t2", part, shape)]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return super().fields(method, part) | {"alpha": method.r if method.alpha is None else method.alpha}
