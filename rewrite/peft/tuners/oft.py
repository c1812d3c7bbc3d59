"""OFT."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import Call, Key, Kind, Part, Tuner, table


class OftTuner(Tuner):
    """Blocks of rotations of the input, of an embedding's output."""

    type = "OFT"
    methods = ("oft",)
    kinds = frozenset({"linear", "embedding", "conv2d"})
    extra = frozenset(
        {"r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
    )
    honours = frozenset()  # PEFT takes the first of the sizes of each side for all
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    only = table({"module_dropout": ((0, 0.0), "it drops rotations as a whole, which no method of rewrite does")})
    bias_only = "oft_only"

    def refusal(self, module: Any, kind: Kind) -> str | None:
        if kind == "conv2d" and max(module.kernel_size) > 1:
            return "PEFT's OFT of a convolution is no rotated kernel, and merges into another function than it computes"
        return super().refusal(module, kind)

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        blocks, size = config.get("r", 0), config.get("oft_block_size", 32)
        return "oft", {
            "block": size if not blocks else 32,
            "blocks": blocks or None,
            "neumann": config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None,
            "coft": config.get("eps", 6e-5) if config.get("coft") else None,
            "share": config.get("block_share", False),
        }

    def keys(self, method: Any, part: Part) -> list[Key]:
        slot, name = ("E", "oft_embedding_R.weight") if part.kind == "embedding" else ("R", "oft_R.weight")
        # PEFT projects its tensor in every forward, and the step after it starts from there.
        return [Key(slot, name, ours=method.projected if method.coft else None)]

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return {
            "r": method.blocks or 0,
            "oft_block_size": 0 if method.blocks else method.block,
            "use_cayley_neumann": method.neumann is not None,
            "num_cayley_neumann_terms": method.neumann or 5,
            "coft": method.coft is not None,
            "eps": method.coft or 6e-5,
            "block_share": method.share,
        }
