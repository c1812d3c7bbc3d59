"""LORA: also rank-stabilised and DoRA; on linear layers, embeddings, convolutions, attention and bare parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

from rewrite.methods.lora import Lora
from rewrite.peft.config import Config
from rewrite.peft.targets import Target, by_path
from rewrite.peft.tuner import Call, Key, Kind, Part, Tensor, Tuner, method_of, number, reordered, shaped, table

_RESIDUAL = {"pissa": "pissa", "olora": "olora"}  # PEFT takes what they start at off the base, again at every load
_PLAIN = (True, False, "gaussian", "eva", "orthogonal", "true", "false")  # those leave the base as it is
_VARIANT = "this variant of LoRA is not among the methods of rewrite"


class LoraTuner(Tuner):
    """y + s B A x; the names of the tensors follow the kind of the layer."""

    type = "LORA"
    methods = ("lora", "dora")
    kinds = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d", "attention", "parameter"})
    transposed = True
    bias_only = "lora_only"
    patterns = table({"r": "rank_pattern", "lora_alpha": "alpha_pattern"})
    extra = frozenset(
        {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"}
        | {"target_parameters", "trainable_token_indices"}
        # without an effect: PEFT looks at the layer, or the field goes with another one that is refused
        | {"fan_in_fan_out", "qalora_group_size", "megatron_core", "eva_config", "corda_config", "lora_ga_config"}
    )
    only = table(
        {
            "layer_replication": (
                (),
                "it builds another model out of this one: replicate the layers first, then adapt",
            ),
            "ensure_weight_tying": ((), "write one adapter for the shared weight, lora@tied, and train it here"),
            "megatron_config": ((), "Megatron's layers are not supported"),
            "loftq_config": ((), "PEFT replaces the base weight by a quantised one when it loads such an adapter"),
            **dict.fromkeys(("use_qalora", "use_bdlora", "velora_config", "kasa_config"), ((), _VARIANT)),
            **dict.fromkeys(("alora_invocation_tokens", "monteclora_config", "arrow_config"), ((), _VARIANT)),
        }
    )

    def call(self, config: Config, target: Target | None, kind: Kind) -> Call:
        path = target.name if target else ""
        r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        if target:
            r, alpha = by_path(config, "rank_pattern", path, r), by_path(config, "alpha_pattern", path, alpha)
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise config.refuse("r" if r == config.get("r") else "rank_pattern", "a rank is a whole number from 1")
        alpha = number(config, "lora_alpha", alpha)
        given: dict[str, Any] = {"r": r, "alpha": None if alpha == r else alpha}
        if alpha <= 0:
            raise config.refuse("lora_alpha", "rewrite wants a scale above 0")
        if config.get("use_rslora"):
            given |= {"scale": "rs", "alpha": None if alpha == r else alpha}
        if kind not in ("embedding", "attention", "parameter"):  # PEFT drops nothing there
            given["dropout"] = number(config, "lora_dropout", config.get("lora_dropout", 0.0))
        self.check(config, kind, target)
        if config.get("lora_bias"):
            given["bias"] = True
        if (init := self.init(config, kind, target)) is not None:
            given["init"] = init
        return ("dora" if config.get("use_dora") else "lora"), given

    def check(self, config: Config, kind: Kind, target: Target | None) -> None:
        """Refuse what PEFT has no answer to, or a wrong one, at a kind of layer."""
        bare = {"attention": "nn.MultiheadAttention", "parameter": "target_parameters", "embedding": "an embedding"}
        if kind in bare and config.get("lora_bias"):
            raise config.refuse("lora_bias", f"PEFT has no such bias on {bare[kind]}")
        if kind in ("attention", "parameter") and config.get("use_dora"):
            raise config.refuse("use_dora", f"PEFT has no DoRA on {bare[kind]}")
        if kind == "parameter" and (config.get("lora_dropout") or config.get("fan_in_fan_out")):
            raise config.refuse("target_parameters", "PEFT takes them without lora_dropout and fan_in_fan_out")
        if target is None:
            return
        layer: Any = target.module
        if kind == "embedding" and layer.max_norm is not None:
            raise config.refuse(
                "target_modules", f"{target.path} has max_norm, which rewrites weights as they are read"
            )
        if kind == "attention" and not layer._qkv_same_embed_dim:
            raise config.refuse("target_modules", f"PEFT cannot adapt {target.path}: its keys have another width")

    def init(self, config: Config, kind: Kind, target: Target | None) -> str | None:
        """How the adapter starts; residual ones do so again at a load, for the base is what they take it off."""
        value = config.fields.get("init_lora_weights", True)
        if value is None or value in _PLAIN:
            return "gaussian" if value == "gaussian" and kind not in ("embedding",) else None
        if value in _RESIDUAL and kind == "embedding":
            return None  # PEFT starts embeddings as ever
        if value in _RESIDUAL and kind == "linear" and not (value == "olora" and _transposed(target)):
            return _RESIDUAL[value]
        if value in _RESIDUAL:
            raise config.refuse("init_lora_weights", f"PEFT has no {value} on this kind of layer")
        if value == "mica":
            raise config.refuse("init_lora_weights", "PEFT freezes B then, and rewrite has no such method")
        raise config.refuse(
            "init_lora_weights",
            "PEFT changes the base weight then, in a way that its file does not tell: convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )

    def parts(self, config: Config, target: Target, kind: Kind) -> list[tuple[str, Call]]:
        name, given = self.call(config, target, kind)
        if kind != "attention":
            return [(target.name, (name, given))]
        # PEFT merges into out_proj twice in a forward (peft 0.21): this is the function that was trained.
        twice = given | {"alpha": 2.0 * (given["alpha"] or given["r"])}
        return [(f"{target.path}.in_proj_weight", (name, given)), (f"{target.path}.out_proj", (name, twice))]

    def keys(self, method: Lora, part: Part) -> list[Key]:
        if part.kind == "parameter":
            return _of_parameter(part)
        if part.kind == "embedding":
            found = [Key("A", "lora_embedding_A"), Key("B", "lora_embedding_B")]
        else:
            ones = (1,) * len(part.kernel)
            columns = (part.shape("A")[-1],) if not ones else (-1, *part.kernel)
            A, B = (method.r, *columns), (*part.shape("B"), *ones)
            found = [shaped("A", "lora_A.weight", part, A), shaped("B", "lora_B.weight", part, B)]
        if "c" in part.graft.slots:
            found.append(Key("c", "lora_B.bias"))
        if "m" in part.graft.slots:
            wide = (1, part.shape("m")[0], *(1,) * len(part.kernel)) if part.kernel else part.shape("m")
            found.append(shaped("m", "lora_magnitude_vector", part, wide))
        return found

    def fits(self, method: Lora, part: Part) -> str | None:
        known = {"A", "B", "A0", "B0", "c", "m"}
        if unknown := sorted(set(part.graft.slots) - known):
            return f"its tensors {', '.join(unknown)} have no place in PEFT's LoRA"
        if part.kernel and part.groups > 1:
            return "PEFT's LoRA on a convolution with groups is another function"
        plain = part.kind in ("embedding", "attention", "attention.out", "parameter")
        if plain and method.bias:
            return f"PEFT has no bias on B at {part.kind}"
        if part.kind in ("attention", "attention.out", "parameter") and method.name == "dora":
            return f"PEFT has no DoRA at {part.kind}"
        inside = _of_attention(part) if part.kind == "attention.out" else None
        if inside is not None and (inside.r, inside.init.residual) != (method.r, method.init.residual):
            return "PEFT has one rank and one kind of start for an attention"
        return None

    def fields(self, method: Lora, part: Part) -> dict[str, Any]:
        rank = 2 * method.r if method.init.residual else method.r
        found: dict[str, Any] = {
            "r": rank,
            "lora_alpha": method.s * (math.sqrt(rank) if method.scale == "rs" else rank),
            "use_rslora": method.scale == "rs",
            "use_dora": method.name == "dora",
            "lora_bias": method.bias,
            "init_lora_weights": True,
        }
        if part.kind not in ("embedding", "attention", "attention.out", "parameter"):
            found["lora_dropout"] = method.dropout
        return found

    def converted(self, method: Lora, part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
        found, scaled = super().converted(method, part, values), dict(values)
        if part.kind == "attention.out":  # PEFT scales it as the projection of its input, and adds it twice
            scaled["B"] = values["B"] * (method.s / (2 * (_of_attention(part) or method).s))
            found = super().converted(method, part, scaled)
        if not method.init.residual:
            return found
        # [B, -B0] [A; A0]: the same function on the base as it is, as PEFT converts such adapters itself.
        start = super().converted(method, part, scaled | {"A": values["A0"], "B": -values["B0"]})
        for name in found:
            if name.endswith(("lora_A.weight", "lora_B.weight")):
                found[name] = torch.cat([found[name], start[name]], int(name.endswith("lora_B.weight")))
        return found


def _of_attention(part: Part) -> Lora | None:
    """The method on the fused projection of the attention that owns an `out_proj`."""
    owner = part.path.removesuffix(".out_proj")
    found = (g for g in part.grafts if g.path == owner and g.tensor == "in_proj_weight" and g.slots)
    graft = next(found, None)
    method = None if graft is None else method_of(graft)
    return method if isinstance(method, Lora) else None


def _transposed(target: Target | None) -> bool:
    return target is not None and type(target.module).__name__ == "Conv1D"


def _of_parameter(part: Part) -> list[Key]:
    """A (r * experts, d) and B (d, r * experts) of a parameter, whose product is the update as it is stored."""
    flipped = len(part.graft.shape) == 3 and bool(getattr(part.module, "is_transposed", False))
    # PEFT's product stands as stored, or transposed where its module says so; ours stands as the matrix.
    turn = flipped != part.transposed
    first, second = ("B", "A") if turn else ("A", "B")
    if len(part.graft.shape) == 2:
        make = reordered if turn else Key
        return [make(first, "lora_A.weight"), make(second, "lora_B.weight")]
    experts = part.graft.shape[0]

    def plain(t: Tensor) -> Tensor:
        return t.mT if turn else t

    return [
        Key(
            first,
            "lora_A.weight",
            lambda t: plain(t).flatten(0, 1),
            lambda t: plain(t.unflatten(0, (experts, -1))),
        ),
        Key(
            second,
            "lora_B.weight",
            lambda t: plain(t).permute(1, 2, 0).flatten(1),
            lambda t: plain(t.unflatten(1, (-1, experts)).permute(2, 0, 1)),
        ),
    ]
