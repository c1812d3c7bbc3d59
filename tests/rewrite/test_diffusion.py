"""Diffusion backbones: a U-Net with cross-attention and a DiT, small ones of our own and diffusers' where installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from tests.models import assert_close, assert_same, changed, disturb, frozen, gradients

WIDTH, HEAD, TEXT = 16, 8, 12


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


class Attend(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.d = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        source = x if source is None else source
        y = F.scaled_dot_product_attention(heads(self.a(x)), heads(self.b(source)), heads(self.c(source)))
        return self.d(y.transpose(1, 2).flatten(2))


class Level(nn.Module):
    """A residual pair of convolutions told the time, then self-attention, cross-attention and a gated network."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.GroupNorm(4, before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1))
        self.two = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1, groups=2))
        self.skip, self.time = nn.Conv2d(before, width, 1), nn.Linear(WIDTH, width)
        self.own, self.text = Attend(width, width), Attend(width, TEXT)
        self.norm, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(24, width)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.skip(x) + self.two(self.one(x) + self.time(time)[..., None, None])
        y = x.flatten(2).transpose(1, 2)
        y = y + self.own(y)
        y = y + self.text(y, text)
        wide, gate = self.wide(self.norm(y)).chunk(2, -1)
        y = y + self.narrow(wide * F.gelu(gate))
        return y.transpose(1, 2).view_as(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.down = nn.ModuleList([Level(WIDTH, WIDTH), Level(WIDTH, 2 * WIDTH)])
        self.up = nn.ModuleList([Level(3 * WIDTH, WIDTH)])
        self.pool, self.grow = nn.Conv2d(WIDTH, WIDTH, 2, stride=2), nn.ConvTranspose2d(2 * WIDTH, 2 * WIDTH, 2, 2)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        phase = time[:, None] * torch.arange(1, 5, device=x.device, dtype=x.dtype)
        now = self.time(torch.cat([phase.sin(), phase.cos()], -1))
        first = self.down[0](self.enter(x), now, text)
        second = self.grow(self.down[1](self.pool(first), now, text))
        return self.leave(self.up[0](torch.cat([first, second], 1), now, text))


class Modulated(nn.Module):
    """A block whose norms are scaled, shifted and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.tell = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.all, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(approximate="tanh"), nn.Linear(40, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.tell(c)[:, None].chunk(6, -1)
        y = F.layer_norm(x, (WIDTH,)) * (1 + s1) + b1
        q, k, v = self.all(y).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2 * self.think(F.layer_norm(x, (WIDTH,)) * (1 + s2) + b2)


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.last = nn.Conv2d(3, WIDTH, 2, stride=2), nn.Linear(WIDTH, 12)
        self.when = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList(Modulated() for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phase = time[:, None] * torch.arange(1, 5, device=x.device, dtype=x.dtype)
        c = self.when(torch.cat([phase.sin(), phase.cos()], -1))
        y = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            y = layer(y, c)
        return F.pixel_shuffle(self.last(y).transpose(1, 2).unflatten(2, (4, 4)), 2)


def example(text: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(4)
    made = {"x": torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)}
    made["time"] = torch.rand(2, generator=g, dtype=torch.float64)
    return made | ({"text": torch.randn(2, 5, TEXT, generator=g, dtype=torch.float64)} if text else {})


def names(model: nn.Module, selector: str, inputs: Any) -> set[str]:
    return {site.name for site in rewrite.plan(model, selector, inputs=inputs).sites}


def test_unet_sites():
    model, inputs = UNet().double(), example(text=True)
    assert names(model, "cross.k", inputs) == {f"{level}.text.b" for level in ("down.0", "down.1", "up.0")}
    assert names(model, "attn.q-cross", inputs) == {f"{level}.own.a" for level in ("down.0", "down.1", "up.0")}
    assert names(model, "ffn.gate", inputs) == {f"{level}.wide[gate]" for level in ("down.0", "down.1", "up.0")}
    assert {"enter", "leave", "pool", "grow", "down.1.two.2"} < names(model, "conv", inputs)


def test_dit_sites():
    model, inputs = DiT().double(), example(text=False)
    assert names(model, "attn.v", inputs) == {f"layers.{n}.all[v]" for n in range(2)}
    assert names(model, "ffn", inputs) == {f"layers.{n}.think.{m}" for n in range(2) for m in (0, 2)}
    assert names(model, "linear-attn-ffn", inputs) >= {"layers.0.tell.1", "when.0", "last"}


@pytest.mark.parametrize(
    ("make", "spec"),
    [(UNet, "lora(r=3)@attn.q,v,ffn,conv"), (UNet, "lora(r=3)@cross"), (DiT, "lora(r=3)@attn.q,v,ffn,conv")],
)
def test_adapts_like_any_model(make: type[nn.Module], spec: str):
    torch._dynamo.reset()
    torch.manual_seed(6)
    model, inputs = make().double(), example(text=make is UNet)
    base, expected = frozen(model), model(**inputs)
    rewrite.compile(model, spec, inputs=inputs, backend="eager")
    assert_close(model.forward(**inputs), expected)
    disturb(model)
    eager = model.forward(**inputs)
    eager.square().sum().backward()
    slopes = gradients(model)
    compiled = model(**inputs)
    compiled.square().sum().backward()
    assert_close(compiled, eager)
    assert_same(gradients(model), slopes)
    assert_close(rewrite.merge(copy.deepcopy(model))(**inputs), eager)
    rewrite.remove(model)
    assert not changed(base, frozen(model))


def test_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8},
        **{"block_out_channels": (32, 64), "cross_attention_dim": 24, "attention_head_dim": 8},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    plan = rewrite.plan(model, "cross.v")
    assert {s.name.rpartition(".")[2] for s in plan.sites} == {"to_v"}
    assert all(".attn2." in s.name for s in plan.sites)
