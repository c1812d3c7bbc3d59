"""The narrow block that side networks are made of: what tensors it has, what it computes, and how it starts.

A pre-norm block with the attention, the feed-forward network and the norms of the block that it stands beside, every
width divided: s + attention(norm(s)), + attention to the encoder's side network where there is one, + feed-forward.
Numbers of heads stay, a head has an even width so that rotary embeddings fit.  It has no biases but those of norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rewrite.blocks import Attends, Block
from rewrite.method import Param, Tensor, kaiming
from rewrite.runtime.rows import ACTIVATIONS
from rewrite.runtime.side import Call
from rewrite.sites import Site

EPS = 1e-6


@dataclass(frozen=True)
class Narrow:
    """The widths of a block divided by `reduction`: of the stream, of a head, of the feed-forward network."""

    stream: int
    head: int
    feed: int
    memory: int


def narrow(block: Block, reduction: int) -> Narrow:
    """The widths of the block beside `block`."""
    attends = block.attention or block.cross
    head = max(2, attends.width // reduction // 2 * 2) if attends else 0
    return Narrow(block.width // reduction, head, max(1, block.feed // reduction), block.memory // reduction)


def refusal(site: Site, reduction: int) -> str | None:
    """Why there is no narrow block beside a block, or None."""
    assert site.block is not None
    width = site.block.width
    return f"reduction={reduction} leaves nothing of its width {width}" if width < reduction else None


def tap(h: Tensor, D: Tensor, b: Tensor, n: Tensor, nb: Tensor) -> Tensor:
    """norm(D h + b), what a network that only reads the streams of a model takes of one."""
    t = F.linear(h, D.to(h.dtype), b.to(h.dtype))
    return F.layer_norm(t, (n.shape[0],), n.to(h.dtype), nb.to(h.dtype))


def params(block: Block, reduction: int) -> dict[str, Param]:
    """The tensors of the block beside `block`."""
    to = narrow(block, reduction)
    found: dict[str, Param] = {}
    if block.attention is not None:
        found |= _norm(block, "n1", to.stream) | _projections("", block.attention, to, to.stream)
    if block.cross is not None and block.memory:
        found |= _norm(block, "nc", to.stream) | _projections("c", block.cross, to, to.memory)
    if block.feed:
        found |= _norm(block, "n2", to.stream)
        found |= {n: Param((to.feed, to.stream), kaiming) for n in ("g", "u") if n == "u" or block.gated}
        found["w"] = Param((to.stream, to.feed), kaiming)
    return found


def _norm(block: Block, name: str, width: int) -> dict[str, Param]:
    gain = {name: Param((width,), torch.nn.init.ones_, decay=False)}
    return gain | ({f"{name}b": Param((width,), decay=False)} if block.layer_norm else {})


def _projections(prefix: str, attends: Attends, to: Narrow, source: int) -> dict[str, Param]:
    q, kv = attends.heads * to.head, attends.kv_heads * to.head
    shapes = {"q": (q, to.stream), "k": (kv, source), "v": (kv, source), "o": (to.stream, q)}
    return {f"{prefix}{name}": Param(shape, kaiming) for name, shape in shapes.items()}


def norm_params(block: Block, reduction: int) -> dict[str, Param]:
    """The tensors of a norm of the narrow stream, `n` and where it has one its bias `nb`."""
    return _norm(block, "n", block.width // reduction)


def normed(s: Tensor, theta: Mapping[str, Tensor], name: str) -> Tensor:
    """A norm of the kind that the block has: by mean and variance where it has a bias."""
    gain, bias = theta[name].to(s.dtype), theta.get(f"{name}b")
    if bias is None:
        return F.rms_norm(s, gain.shape, gain, EPS)
    return F.layer_norm(s, gain.shape, gain, bias.to(s.dtype), EPS)


def apply(s: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor], dropout: float = 0.0) -> Tensor:
    """The narrow block on its stream s (rows, tokens, width); `dropout` of probabilities, hidden units and branches."""
    if block.attention is not None:
        x = normed(s, theta, "n1")
        q, k, v = _heads(x, x, theta, "", block.attention)
        s = s + call.drop(_merged(call.attend(q, k, v, dropout), theta["o"]), dropout)
    if block.cross is not None and block.memory:
        q, k, v = _heads(normed(s, theta, "nc"), call.memory, theta, "c", block.cross)
        s = s + call.drop(_merged(call.attend_memory(q, k, v, dropout), theta["co"]), dropout)
    if block.feed:
        x = normed(s, theta, "n2")
        act, up = ACTIVATIONS[block.activation], _linear(x, theta["u"])
        hidden = act(_linear(x, theta["g"])) * up if block.gated else act(up)
        s = s + call.drop(_linear(call.drop(hidden, dropout), theta["w"]), dropout)
    return s


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def _heads(
    x: Tensor, source: Tensor, theta: Mapping[str, Tensor], prefix: str, attends: Attends
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, keys and values of its source, as (rows, heads, tokens, width)."""
    pairs = ((x, "q", attends.heads), (source, "k", attends.kv_heads), (source, "v", attends.kv_heads))
    q, k, v = (_linear(y, theta[prefix + n]).unflatten(-1, (h, -1)).transpose(1, 2) for y, n, h in pairs)
    return q, k, v


def _merged(x: Tensor, weight: Tensor) -> Tensor:
    return _linear(x.transpose(1, 2).flatten(2), weight)


# --- structured pruning ---


def prune(
    sites: Sequence[Site],
    weights: Sequence[Mapping[str, Tensor]],
    theta: Sequence[Mapping[str, Tensor]],
    reduction: int,
) -> None:
    """Start side blocks, and their taps `D`, as the parts of the blocks with the largest sums of |W|.

    Which channels of the stream are kept is one choice for a whole stack, so that the streams of all its rungs are
    the same part of the model's; taps then are that choice.  In a head, queries and keys keep pairs of channels that
    are evenly spread, those whose rotary angles the narrow head takes.  A matrix that cannot be told from the others
    (experts) stays random.
    """
    kept: dict[str, Tensor] = {}
    stacks = dict.fromkeys(s.block.stack for s in sites if s.block)
    for stack in stacks:
        members = [(s, w) for s, w in zip(sites, weights, strict=True) if s.block and s.block.stack == stack]
        kept[stack] = _channels([w for s, w in members if s.part == "rung"], members[0][0].block, reduction)  # type: ignore[arg-type]
    memory = next((kept[s.block.stack] for s in sites if s.part == "memory" and s.block), None)
    for site, W, held in zip(sites, weights, theta, strict=True):
        assert site.block is not None
        stream = kept[site.block.stack]
        if "D" in held:
            held["D"].zero_()[torch.arange(len(stream)), stream.to(held["D"].device)] = 1
        if site.part == "rung":
            _pruned(site.block, narrow(site.block, reduction), W, held, stream, memory)


READS = ("attn.q", "attn.k", "attn.v", "cross.q", "ffn.gate", "ffn.up")
WRITES = ("attn.o", "cross.o", "ffn.down")


def _channels(weights: Sequence[Mapping[str, Tensor]], block: Block, reduction: int) -> Tensor:
    """The channels of a stream that its blocks read and write most."""
    score = torch.zeros(block.width)
    for W in weights:
        for role, matrix in W.items():
            sums = _sums(matrix, 0 if role in READS else 1) if role in (*READS, *WRITES) else None
            if sums is not None and len(sums) == block.width:
                score += sums / sums.mean().clamp_min(1e-30)
    return _top(score, block.width // reduction)


def _sums(matrix: Tensor, dim: int) -> Tensor:
    return matrix.abs().sum(dim, dtype=torch.float32).cpu()


def _top(score: Tensor, count: int) -> Tensor:
    return score.topk(count).indices.sort().values


def _pruned(
    block: Block,
    to: Narrow,
    W: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    stream: Tensor,
    memory: Tensor | None,
) -> None:
    for group, prefix, attends, source in (
        ("attn", "", block.attention, stream),
        ("cross", "c", block.cross, memory),
    ):
        named = {n: W[f"{group}.{n}"] for n in "qkvo" if f"{group}.{n}" in W}
        if attends is None or source is None or f"{prefix}q" not in held or len(named) < 4:
            continue
        q, k, v = _head_rows(named, attends, to.head)
        copies = {"q": (q, stream), "k": (k, source), "v": (v, source)}
        for name, (rows, columns) in copies.items():
            _copy(held[prefix + name], named[name], rows, columns)
        _copy(held[f"{prefix}o"], named["o"], stream, _for_queries(v, attends, to.head))
    if "w" in held and {"ffn.up", "ffn.down"} <= W.keys():
        score = _sums(W["ffn.up"], 1) + _sums(W["ffn.down"], 0)
        score = score + _sums(W["ffn.gate"], 1) if "ffn.gate" in W and "g" in held else score
        feed = _top(score, to.feed)
        for name, role in (("g", "ffn.gate"), ("u", "ffn.up")):
            if name in held and role in W:
                _copy(held[name], W[role], feed, stream)
        _copy(held["w"], W["ffn.down"], stream, feed)


def _head_rows(W: Mapping[str, Tensor], attends: Attends, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of query, key and value: the same pairs in every head, and of values the largest in each."""
    half, width = head // 2, attends.width
    first = torch.arange(half) * max(1, width // 2 // half)
    pairs = torch.cat([first, first + width // 2])[:head] if width >= head else torch.arange(width)
    q, k = ((torch.arange(n)[:, None] * width + pairs).flatten() for n in (attends.heads, attends.kv_heads))
    score = _sums(W["v"], 1).view(attends.kv_heads, width)
    score = score + _sums(W["o"], 0).view(attends.kv_heads, -1, width).sum(1)
    within = score.topk(min(head, width), dim=1).indices.sort(dim=1).values
    return q, k, (torch.arange(attends.kv_heads)[:, None] * width + within).flatten()


def _for_queries(rows: Tensor, attends: Attends, head: int) -> Tensor:
    """The columns of the output projection for rows of values: those of a group for each of its query heads."""
    within = rows.view(attends.kv_heads, -1) % attends.width
    each = within.repeat_interleave(attends.heads // attends.kv_heads, 0)
    return (torch.arange(attends.heads)[:, None] * attends.width + each).flatten()


def _copy(new: Tensor, old: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Part of a matrix, into a tensor of just that size."""
    if new.shape == (len(rows), len(columns)):
        new.copy_(old[rows.to(old.device)][:, columns.to(old.device)])
