"""Published operator sequences, restated: for peers whose package does not run where we measure.

They are our own words for what the publications and releases of those projects compute, with cuBLAS doing the work as
there; no code is theirs.  They are labelled as restatements wherever they are reported.
"""

# An autograd.Function names the gradients that it gets; its base class takes them as one tuple.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
Weight = Callable[[], Tensor]
"""Gives the weight (outputs, inputs) of a layer; decodes it where it is stored in 4 bits."""


def add_low_rank(y: Tensor, x: Tensor, scale: float, A: Tensor, B: Tensor) -> None:
    """y += scale x A' B', in place, by two products."""
    y.addmm_(x @ A.t(), B.t(), alpha=scale)


class LoraPath(torch.autograd.Function):
    """The path of Unsloth (2026.10) through LoRA layers that read one input: it saves x and the adapters, nothing else.

    Forward, for each layer: x W', x A', and the second product of the branch added in place with the scale as alpha.
    Backward: dy B once, dA and dB with alpha, x A' computed again; dx is one buffer that every product is added to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Sequence[Weight], scale: float, *adapters: Tensor) -> tuple[Tensor, ...]:
        ctx.weights, ctx.scale = weights, scale
        ctx.save_for_backward(x, *adapters)
        flat, ys = x.flatten(0, -2), list[Tensor]()
        for k, weight in enumerate(weights):
            A, B = (t.to(x.dtype) for t in adapters[2 * k : 2 * k + 2])
            y = flat @ weight().t()
            add_low_rank(y, flat, scale, A, B)
            ys.append(y.unflatten(0, x.shape[:-1]))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x, *adapters = ctx.saved_tensors
        flat, dx, found = x.flatten(0, -2), None, list[Tensor]()
        for k, (weight, dy) in enumerate(zip(ctx.weights, dys, strict=True)):
            dA, dB, dx = lora_backward(flat, dy.flatten(0, -2), weight, ctx.scale, dx, *adapters[2 * k : 2 * k + 2])
            found += [dA, dB]
        assert dx is not None
        return dx.view_as(x), None, None, *found


def lora_backward(
    x: Tensor, dy: Tensor, weight: Weight, scale: float, dx: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dA, dB, and dx with this layer's share added to it."""
    low, high = A.to(x.dtype), B.to(x.dtype)
    ds = dy @ high
    dA, dB = torch.empty_like(low), torch.empty_like(high)
    dA.addmm_(ds.t(), x, alpha=scale, beta=0)
    dB.addmm_(dy.t(), x @ low.t(), alpha=scale, beta=0)
    dx = dy @ weight() if dx is None else dx.addmm_(dy, weight())
    dx.addmm_(ds, low, alpha=scale)
    return dA.to(A.dtype), dB.to(B.dtype), dx


class SlicePath(torch.autograd.Function):
    """S2FT's reference for input columns: the trained slice D stands in the weight W, so forward is the base product.

    The slice of x is copied for the backward pass, where a batched product is summed over the batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, D: Tensor, start: int, stop: int) -> Tensor:
        ctx.weight, ctx.dtype = W, D.dtype
        ctx.save_for_backward(x[..., start:stop].clone())
        return F.linear(x, W)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (part,) = ctx.saved_tensors
        return dy @ ctx.weight, None, (dy.transpose(-1, -2) @ part).sum(0).to(ctx.dtype), None, None


class RmsNorm(torch.autograd.Function):
    """RMS norm that saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _norm_backward(dy, *ctx.saved_tensors), None, None


class MlpPath(torch.autograd.Function):
    """Unsloth's path through a gated feed-forward network: saves x, gate and up, and computes their product again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Sequence[Weight], scale: float, *adapters: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        gate, up = flat @ weights[0]().t(), flat @ weights[1]().t()
        add_low_rank(gate, flat, scale, *adapters[0:2])
        add_low_rank(up, flat, scale, *adapters[2:4])
        hidden = _gated(gate, up)
        y = hidden @ weights[2]().t()
        add_low_rank(y, hidden, scale, *adapters[4:6])
        ctx.weights, ctx.scale = weights, scale
        ctx.save_for_backward(x, gate, up, *adapters)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate, up, *adapters = ctx.saved_tensors
        (w_gate, w_up, w_down), scale, flat, dy = ctx.weights, ctx.scale, x.flatten(0, -2), dy.flatten(0, -2)
        A, B = adapters[4:6]
        ds = dy @ B
        dhidden = dy @ w_down()
        dhidden.addmm_(ds, A, alpha=scale)
        hidden, dgate, dup = _gated_backward(dhidden, gate, up)
        dA, dB = torch.empty_like(A), torch.empty_like(B)
        dA.addmm_(ds.t(), hidden, alpha=scale, beta=0)
        dB.addmm_(dy.t(), hidden @ A.t(), alpha=scale, beta=0)
        dA_up, dB_up, dx = lora_backward(flat, dup, w_up, scale, None, *adapters[2:4])
        dA_gate, dB_gate, dx = lora_backward(flat, dgate, w_gate, scale, dx, *adapters[0:2])
        return dx.view_as(x), None, None, dA_gate, dB_gate, dA_up, dB_up, dA, dB


class Rope(torch.autograd.Function):
    """Rotary positions, saving nothing but the angles that every layer shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.angles
        return _rotate(dy, cos, -sin), None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale).to(x.dtype) * weight, scale


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    normed, d = x.float() * scale, dy.float() * weight.float()
    return (scale * (d - normed * (d * normed).mean(-1, keepdim=True))).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.float()).to(gate.dtype) * up


def _gated_backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    e, g, d = gate.float(), up.float(), d.float()
    s = torch.sigmoid(e)
    f = e * s
    return (f * g).to(gate.dtype), (d * g * (s + f * (1 - s))).to(gate.dtype), (d * f).to(up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class LlamaLayer(nn.Module):
    """Unsloth's path through a Llama decoder layer, on the weights of one from transformers and adapters of our own.

    Its element-wise kernels are generated here by Inductor, one each for what are single Triton kernels there.
    """

    def __init__(self, layer: Any, adapters: Sequence[nn.Parameter], scale: float) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.adapters, self.scale, self.width = nn.ParameterList(adapters), scale, attention.head_dim
        own = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        self.weights = [_reader(m) for m in (*own, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        self.norms = [(n.weight, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        adapters = list(self.adapters)
        q, k, v = LoraPath.apply(RmsNorm.apply(x, *self.norms[0]), self.weights[:3], self.scale, *adapters[:6])
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in (q, k, v))
        q, k = Rope.apply(q, cos, sin), Rope.apply(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        (out,) = LoraPath.apply(mixed.transpose(1, 2).flatten(2), self.weights[3:4], self.scale, *adapters[6:8])
        x = x + out
        return x + MlpPath.apply(RmsNorm.apply(x, *self.norms[1]), self.weights[4:], self.scale, *adapters[8:])


def _reader(layer: nn.Module) -> Weight:
    return lambda: layer.weight  # type: ignore[return-value]


def compiled_pointwise() -> None:
    """Let Inductor generate the element-wise kernels, as one each: they are Triton kernels where they come from."""
    for name in ("_norm", "_norm_backward", "_gated", "_gated_backward", "_rotate"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)
