"""Small models of every kind of layer that PEFT adapts, with sizes that are nowhere square, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 60
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
_BERT = {"vocab_size": VOCABULARY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
_MOE = {**_DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def llama(**changes: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **changes}))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(**_SIZES, **_BERT, max_position_embeddings=32, problem_type="single_label_classification")
    )


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_MOE))


class Mlp(nn.Module):
    """Two linear layers and a norm, with and without biases."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.norm = nn.Linear(10, 20, bias=bias), nn.LayerNorm(20)
        self.lin1, self.head = nn.Linear(20, 13, bias=bias), nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.lin1(self.norm(F.gelu(self.lin0(x))))))


class Deep(nn.Module):
    """Numbered layers of two linear ones, with a list inside of each."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(10, 14), "down": nn.Linear(14, 10), "list": nn.ModuleList([nn.Linear(10, 10)])}
            )
            for _ in range(3)
        )
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers: Any = self.model.layers
        for layer in layers:
            x = x + layer["list"][0](layer["down"](F.gelu(layer["up"](x))))
        return self.head(x)


class Nested(nn.Sequential):
    """Layers that go by numbers, of which one ends in another."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(10, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 8), nn.Tanh()), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


class Words(nn.Module):
    """An embedding, a `Conv1D` and a linear layer."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(17, 6, padding_idx=padding), Conv1D(9, 6), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(F.gelu(self.conv1d(self.emb(x))))


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales what it looks up."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale: torch.Tensor
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


class ScaledWords(Words):
    """Words, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = ScaledEmbedding(17, 6)


class Convolved(nn.Module):
    """A convolution over `dims` dimensions, then a linear layer."""

    def __init__(self, dims: int, square: bool = False, **settings: Any) -> None:
        super().__init__()
        kernel = (2,) * dims if square else (3, 2, 1)[:dims]
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        stride, padding = (2, 1) if square else ((2, 1, 1)[:dims], (1, 0, 0)[:dims])
        self.conv = layer(4, 6, kernel_size=kernel, stride=stride, padding=padding, **settings)
        self.narrow, self.lin0 = layer(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(torch.tanh(self.narrow(F.gelu(self.conv(x)))).flatten(2).mean(-1))


class Attending(nn.Module):
    """`nn.MultiheadAttention` between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.mha, self.lin1 = (
            nn.Linear(10, 12),
            nn.MultiheadAttention(12, 3, batch_first=True),
            nn.Linear(12, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.lin0(x))
        return self.lin1(self.mha(h, h, h, need_weights=False)[0])


class Bare(nn.Module):
    """A bare matrix, and a stack of them as experts, that their modules multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(7, 10) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights.t()


class Turned(nn.Module):
    """A bare matrix, stored as (d_in, d_out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(10, 7) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights


class Experts(nn.Module):
    """Three experts as stacks of matrices, both stored as (experts, d_out, d_in), or both turned."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 10, 8), (3, 8, 10)) if is_transposed else ((3, 8, 10), (3, 10, 8))
        self.up, self.down = nn.Parameter(torch.randn(up) / 3), nn.Parameter(torch.randn(down) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)[None].expand(3, -1, -1)
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.tanh(tokens @ up) @ down).mean(0).view_as(x)


class Around(nn.Module):
    """A module in the middle of two linear layers."""

    def __init__(self, inner: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.lin0, self.inner, self.lin1 = nn.Linear(10, 10), inner(), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.tanh(self.inner(torch.tanh(self.lin0(x)))))


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
    "qwen3_moe": qwen3_moe,
    "mlp": Mlp,
    "mlp without bias": lambda: Mlp(bias=False),
    "deep": Deep,
    "nested": Nested,
    "words": Words,
    "padded words": lambda: Words(padding=1),
    "scaled words": ScaledWords,
    "conv1": lambda: Convolved(1),
    "conv2": lambda: Convolved(2),
    "conv3": lambda: Convolved(3),
    "square conv2": lambda: Convolved(2, square=True),
    "conv2 without bias": lambda: Convolved(2, bias=False),
    "grouped conv2": lambda: Convolved(2, groups=2),
    "dilated conv2": lambda: Convolved(2, dilation=2),
    "mha": Attending,
    "bare": lambda: Around(Bare, 7),
    "turned": lambda: Around(Turned, 7),
    "experts": lambda: Around(Experts, 10),
    "turned experts": lambda: Around(lambda: Experts(True), 10),
}
_DIMS = {"conv1": (7,), "conv2": (7, 6), "conv3": (5, 4, 3)}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of that name with the same weights at every call, none at zero: a zero bias hides mistakes."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = BUILDERS[name]()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.to(dtype).eval()


def batch(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of that model; ids where it reads tokens."""
    g = torch.Generator().manual_seed(1)
    kind = name.split()[-1]
    if kind in ("llama", "gpt2", "qwen3_moe"):
        ids = torch.randint(3, VOCABULARY, (2, 7), generator=g)
        return {"input_ids": ids, "labels": ids}
    if kind == "bert":
        ids = torch.randint(3, VOCABULARY, (2, 7), generator=g)
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    if kind == "words":
        return {"x": torch.tensor([[1, 3, 3, 16], [0, 10, 1, 5]])}
    dims = next((d for n, d in _DIMS.items() if n in name), None)
    shape = (2, 4, *dims) if dims else (2, 5, 10)
    return {"x": torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()}
