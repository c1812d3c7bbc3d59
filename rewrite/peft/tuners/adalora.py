"""ADALORA.  PEFT adds its regularisation to the loss by itself; here that is `rewrite.regulariser(model)`."""

from __future__ import annotations

from typing import Any

from rewrite.peft.config import Config
from rewrite.peft.targets import Target
from rewrite.peft.tuner import SIDES, Call, Kind, Part, Tuner, table

_OTHER = "AdaLoRA has no such variant"


class AdaloraTuner(Tuner):
    """B diag(E) A."""

    type = "ADALORA"
    methods = ("adalora",)
    kinds = frozenset({"linear", "conv2d"})
    honours = SIDES | {"dilation"}
    transposed = True
    arguments = table(
        {
            "r": ("init_r", 12),
            "target": ("target_r", 8),
            "alpha": ("lora_alpha", 8),
            "dropout": ("lora_dropout", 0.0),
            "steps": ("total_step", 1000),
            "warmup": ("tinit", 0),
            "final": ("tfinal", 0),
            "every": ("deltaT", 1),
            "beta1": ("beta1", 0.85),
            "beta2": ("beta2", 0.85),
            "orthogonal": ("orth_reg_weight", 0.5),
        }
    )
    # `r` is a field of LoRA that AdaLoRA does not read; the others go with fields that are refused.
    starts = frozenset({"init_lora_weights", "fan_in_fan_out", "r", "qalora_group_size", "megatron_core"})
    only = table(
        {
            "rank_pattern": (
                (),
                "its ranks are cut: PEFT keeps the entries that are left, and the place of none of them",
            ),
            **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "target_parameters", "loftq_config"), ((), _OTHER)),
        }
    )
    bias_only = "lora_only"
    tensors = table({"A": "lora_A", "B": "lora_B", "E": "lora_E"})

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        name, given = super().call(config, target, kind)
        if given["alpha"] <= 0:
            given["alpha"] = float(given["r"])  # as PEFT takes it
        return name, given

    def fields(self, method: Any, part: Part) -> dict[str, Any]:
        return super().fields(method, part) | {"r": method.r}
