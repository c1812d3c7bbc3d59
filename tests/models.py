"""Tiny models of six architectures from their config classes, batches for them, and what tests ask of them.

Sizes are rectangular wherever the architecture allows it, and heads share keys and values where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 100
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
_QWEN3: dict[str, Any] = {**_DECODER, "head_dim": 16}
_GPT2: dict[str, Any] = {
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
}
_BERT: dict[str, Any] = {
    **{**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "problem_type": "single_label_classification",  # else the first forward writes it, and the second compiles anew
}
_VIT: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8, "problem_type": "single_label_classification"}
_T5: dict[str, Any] = {
    **{"d_model": 64, "d_ff": 96, "d_kv": 12, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY},
    **{"dropout_rate": 0.0, "decoder_start_token_id": 0},
}


def llama(**changes: Any) -> nn.Module:
    """Grouped keys and values, a gated feed-forward, an untied head."""
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **changes}))


def qwen3(**changes: Any) -> nn.Module:
    """As Llama, with norms on queries and keys."""
    return Qwen3ForCausalLM(Qwen3Config(**{**_QWEN3, **changes}))


def gpt2(**changes: Any) -> nn.Module:
    """`Conv1D` layers, a fused query-key-value projection, a tied head."""
    return GPT2LMHeadModel(GPT2Config(**{**_GPT2, **changes}))


def bert(**changes: Any) -> nn.Module:
    """An encoder with a classifier on its first token."""
    return BertForSequenceClassification(BertConfig(**{**_BERT, **changes}))


def vit(**changes: Any) -> nn.Module:
    """Images of 32 x 32 in patches of 8 x 8, with a classifier."""
    return ViTForImageClassification(ViTConfig(**{**_VIT, **changes}))


def t5(**changes: Any) -> nn.Module:
    """An encoder and a decoder with cross attention; the head shares the embedding."""
    return T5ForConditionalGeneration(T5Config(**{**_T5, **changes}))


class Output(NamedTuple):
    """What the Hugging Face models return, as far as tests ask for it."""

    loss: torch.Tensor
    logits: torch.Tensor


class Small(nn.Module):
    """Two projections, for what does not depend on the architecture: compiles in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 19), nn.Linear(19, 5, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Output:
        logits = self.down(F.gelu(self.up(x)))
        return Output(F.mse_loss(logits, labels), logits)


BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "qwen3": qwen3,
}
ONE_LAYER: Mapping[str, dict[str, Any]] = {
    **{name: {"num_hidden_layers": 1} for name in ("llama", "bert", "vit", "qwen3")},
    **{"gpt2": {"n_layer": 1}, "t5": {"num_layers": 1}, "small": {}},
}
"""What makes a builder's model as shallow as it can be: a layer more takes Dynamo a second more."""
SPECS: Mapping[str, str] = {
    "lora": "lora(r=4)@attn.q,v",
    "dropout": "lora(r=4, dropout=0.1)@linear",
    "pissa+full": "lora(r=8, init=pissa)@attn + full(norm)",
    "lora+nf4": "lora(r=4)@attn.q,v + nf4(base)",
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model with the random weights of `seed`; every call with the same arguments gives the same model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Small() if name == "small" else BUILDERS[name](**changes)
    return in_own_dtype(model.to(dtype))


def in_own_dtype(model: nn.Module) -> nn.Module:
    """Let a float64 language model compute its loss in float64: its own casts to float32, and hides what is below."""
    if getattr(model, "dtype", None) is torch.float64 and "LMLoss" in getattr(model.loss_function, "__name__", ""):
        model.loss_function = next_token_loss
    return model


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> torch.Tensor:
    """The loss of a causal language model as Hugging Face computes it, less its cast."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.view(-1, vocab_size), shifted, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def batch(
    name: str, rows: int = 2, tokens: int = 9, seed: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Inputs with labels for the model of that name."""
    g = torch.Generator().manual_seed(seed)
    if name == "small":
        x, labels = torch.randn(rows, tokens, 12, generator=g, dtype=torch.float64).to(dtype).split([7, 5], dim=-1)
        return {"x": x, "labels": labels}
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=g)
    classes = torch.randint(0, 2, (rows,), generator=g)
    if name == "vit":
        pixels = torch.randn(rows, 3, 32, 32, generator=g, dtype=torch.float64)
        return {"pixel_values": pixels.to(dtype), "labels": classes}
    if name == "bert":
        return {"input_ids": ids, "labels": classes}
    if name == "t5":
        return {"input_ids": ids, "labels": torch.randint(3, VOCABULARY, (rows, tokens - 2), generator=g)}
    return {"input_ids": ids, "labels": ids}


def disturb(model: nn.Module, amount: float = 0.1, seed: int = 2) -> nn.Module:
    """Move every trainable tensor away from where it starts: an adapter with B = 0 hides every mistake."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
                parameter.add_(noise.to(parameter), alpha=amount)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all parameters that have one, by name; takes them off."""
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def step(model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """One forward and backward through `call`: its output and every gradient."""
    output = call(**inputs)
    output.loss.backward()
    return output, gradients(model)


def assert_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    """The same names, and every tensor equal to `tolerance` relative to its largest entry."""
    assert sorted(left) == sorted(right)
    for name in left:
        assert_close(left[name], right[name], tolerance, name)


def assert_close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-9, name: str = "") -> None:
    """Equal to `tolerance` relative to the largest entry of `right`; nothing else is forgiven."""
    assert left.shape == right.shape, name
    assert left.dtype == right.dtype, name
    if not right.numel():
        return
    left, right = left.detach(), right.detach()
    scale = right.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error = float((left - right).abs().max() / scale)
    assert error <= tolerance, f"{name}: {error:.2e} relative to its largest entry"


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a state dict, to compare with later."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit, or are not in both."""
    both = before.keys() & after.keys()
    differing = [n for n in both if before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n])]
    return sorted([*differing, *(before.keys() ^ after.keys())])


def traces(model: nn.Module) -> list[str]:
    """Everything on a model that does not belong to a plain one of its class."""
    found: list[str] = []
    for path, module in model.named_modules():
        found += [f"{path}: {type(module).__name__}" for _ in [0] if "Parametrized" in type(module).__name__]
        found += [f"{path}.{key}" for key in _ours(vars(module))]
        found += [f"{path}.{key}" for key in module._modules if key in ("adapters", "parametrizations")]
        held = [v for name, v in vars(module).items() if name.endswith("_hooks") and isinstance(v, Mapping)]
        hooks = [hook for each in held for hook in each.values()]
        found += [f"{path}: {hook}" for hook in hooks if "rewrite" in _module(hook)]
    if model._compiled_call_impl is not None:
        found.append("a compiled call")
    return found


def _module(function: Any) -> str:
    """The Python module that a hook, however wrapped, comes from."""
    return str(getattr(getattr(function, "hook", function), "__module__", ""))


def _ours(attributes: Mapping[str, Any]) -> list[str]:
    """Instance attributes that we made: marks, overridden methods."""
    return [
        key
        for key, value in attributes.items()
        if "rewrite" in key or "rewrite" in _module(getattr(value, "__func__", value))
    ]
