"""Attention, feed-forward networks and blocks in layouts that no library has, with names that say nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 24, 3
HEAD = WIDTH // HEADS


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / HEAD**0.5).softmax(-1) @ v


class Separate(nn.Module):
    """Three projections, the key's first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.three, self.four = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = heads(self.one(x)), heads(self.two(x)), heads(self.three(x))
        return self.four(joined(F.scaled_dot_product_attention(q, k, v)))


class Lying(Separate):
    """Separate, under names that say query for key."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = self.one, self.two
        del self.one, self.two

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.three(x))
        return self.four(joined(eager(q, k, v)))


class Interleaved(nn.Module):
    """Rows v, q, k of every head after one another, in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = self.all(x).unflatten(-1, (HEADS, 3, HEAD)).transpose(1, 2).unbind(3)
        return self.out(joined(eager(q, k, v)))


class Strided(Interleaved):
    """Every third row is of the query."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.all(x)
        q, k, v = heads(y[..., ::3]), heads(y[..., 1::3]), heads(y[..., 2::3])
        return self.out(joined(eager(q, k, v)))


class Transposed(Interleaved):
    """Scores as keys by queries, a softmax over the first of the two."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads, self.all(x).chunk(3, -1))
        p = (k @ q.mT).softmax(-2)
        return self.out(joined((v.mT @ p).mT))


class Einsum(Interleaved):
    """Products spelled as sums over letters."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, HEAD)) for t in self.all(x).split(WIDTH, -1))
        p = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2))


class Grouped(nn.Module):
    """One key and one value head for all queries, in one weight, and rotated queries with a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(WIDTH, WIDTH + 2 * HEAD), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads, self.all(x).split([WIDTH, HEAD, HEAD], -1))
        q = self.scale(q)
        q = q * 0.8 + torch.cat([-q[..., HEAD // 2 :], q[..., : HEAD // 2]], -1) * 0.6
        return self.out(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


class Plain(nn.Module):
    """down(act(up(x))), both square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).clamp(min=0.0).tanh())


class Gated(nn.Module):
    """Gate and up in one weight, a row of each in turn; the gate is the second."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Linear(WIDTH, 2 * 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return self.last(y[..., ::2] * F.silu(y[..., 1::2]))


class Block(nn.Module):
    def __init__(self, mix: type[nn.Module], think: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.m, self.t = mix(), think()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.m(self.a(x))
        return x + self.t(self.b(x))


class Stack(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, mix: type[nn.Module] = Separate, think: type[nn.Module] = Plain) -> None:
        super().__init__()
        self.table = nn.Embedding(31, WIDTH)
        self.items = nn.ModuleList(Block(mix, think) for _ in range(2))
        self.final = nn.Linear(WIDTH, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for item in self.items:
            x = item(x)
        return self.final(x)


class Other(Stack):
    """A second sequence whose values and keys the first attends to, and rows picked by what values say."""

    def __init__(self, reads_values: bool = False) -> None:
        super().__init__()
        self.source = nn.Linear(7, WIDTH)
        self.qq, self.kk, self.vv = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.reads_values = reads_values

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, other = self.table(ids), self.source(memory)
        x = x + joined(eager(heads(self.qq(x)), heads(self.kk(other)), heads(self.vv(other))))
        if self.reads_values and float(memory.sum()) > 1e9:
            x = x * 2
        for item in self.items:
            x = item(x)
        return self.final(x)


class Experts(nn.Module):
    """A mixture whose experts are one parameter each way, stored input first, gate and up in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(WIDTH, 4, bias=False)
        self.big = nn.Parameter(torch.randn(4, WIDTH, 2 * 20) / 5)
        self.small = nn.Parameter(torch.randn(4, 20, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, which = self.pick(flat).softmax(-1).topk(2)
        y = flat.unsqueeze(1).unsqueeze(2) @ self.big[which]
        y = F.gelu(y[..., :20]) * y[..., 20:]
        return ((y @ self.small[which]).squeeze(2) * weight.unsqueeze(-1)).sum(1).view_as(x)


class TiedHead(Stack):
    """The head is computed with the embedding's weight, by a function."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for item in self.items:
            x = item(x)
        return F.linear(x, self.table.weight)
