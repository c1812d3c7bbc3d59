"""A Llama-shaped decoder in plain PyTorch, for golden texts: they must not move with a version of transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import rewrite
from rewrite.runtime.captures import records_of


class Attention(nn.Module):
    def __init__(self, width: int, keys: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(64), nn.RMSNorm(64)
        self.self_attn, self.mlp = Attention(64, 32), FeedForward(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


class Decoder(nn.Module):
    """Tokens (batch, length) -> logits (batch, length, 50)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(64)
        self.lm_head = nn.Linear(64, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


SPEC = "lora(r=4, alpha=8)@attn.q,v + nf4(base) + full(norm)"
IDS = torch.arange(18).reshape(2, 9)


def compiled(spec: str = SPEC, backend: str = "eager") -> nn.Module:
    """A compiled decoder that was called once for training and once for inference; a pass says that it took 12 ms."""
    torch.manual_seed(0)
    model = rewrite.compile(Decoder(), spec, backend=backend)
    model(IDS).square().mean().backward()
    with torch.no_grad():
        model.eval()(IDS)
    for done in (p for record in records_of(model) for p in record.passes):
        done.seconds = 0.012
    return model.train()
