"""Side networks: blocks of our own beside those of a model, which read its stream and join it where it ends.

A block's forward hook taps what comes out of it and takes the network one step on; at the end of the stack the state
of the network joins the stream.  The state lives in a `Run` from hook to hook of one forward, and is dropped at its
end.  Nothing is detached: a frozen model has no gradient to give, so no backward of it exists, and where something
inside of it trains (an adapter beside the network), its gradient through the network is exact.

The network sees what the blocks are told: masks and rotary embeddings are read from their arguments, by the names
that Hugging Face transformers uses.  Its keys and values of past tokens are further layers of the model's own cache,
so that whatever is done to that (beams reordered, tokens taken back) is done to them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rewrite.errors import RewriteError
from rewrite.runtime import fallback
from rewrite.runtime.adapter import ADAPTERS, Adapter
from rewrite.runtime.graft import Graft
from rewrite.runtime.rows import Rows, check, layers_of

Tensor = torch.Tensor
MASKED = -1e4
"""An additive mask at or below this hides a key."""
MEMORY = "rewrite_side_"
"""Key of an encoder's output that holds what its side network made, for a decoder that is called later."""


class Run:
    """What the side networks of one clause carry from hook to hook within a forward: nothing outside of one."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.calls: dict[str, Call] = {}  # of the last block that was tapped
        self.memory: Any = None
        self.within = False  # a forward of the whole model, which clears everything at its end

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return Run()

    def __reduce__(self) -> tuple[type[Run], tuple[()]]:
        return Run, ()


class SidePart(Adapter):
    """The tensors of one part of a side network."""

    run: Run
    arguments: tuple[str, ...]  # of the module that it stands at
    layers: dict[str, nn.Module]  # of the block, by role, where rows of ours go through them

    def tap(self, h: Tensor) -> Tensor:
        """What the network sees of a stream."""
        assert self.op is not None
        return self.op(h, *self._read())

    def forward(self, y: Tensor, s: Tensor) -> Tensor:
        """A stream that the network has joined."""
        assert self.op is not None
        gate = (self.gate,) if self.graft.gated else ()
        return self.op(y, s, *self._read(), *gate)

    def _read(self) -> list[Tensor]:
        held = self.tensors()
        return [held[name] for name in self.graft.side.names]  # type: ignore[union-attr]


@dataclass
class Call:
    """What a block was told in a forward, as far as a side network needs it.

    mask        (rows, 1 or heads, queries, keys), true or 0 where a key is attended to; None for all of them
    rotary      cosines and sines (rows, tokens, width of a head) of the model's own heads
    cache       keys and values of past tokens, or None; `slot` is our layer of it
    memory      what the side network of an encoder made, with its mask
    rows        sends rows of ours through the layers of the block, where the network asks for that
    training    whether the network trains: whether it may drop
    """

    causal: bool = False
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Any = None
    slot: int = 0
    window: int | None = None
    memory: Any = None
    memory_mask: Tensor | None = None
    rows: Rows | None = None
    training: bool = False

    def recall(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, tokens, width) with those of past tokens in front, which are kept."""
        if self.cache is None:
            return k, v
        k, v = self.cache.layers[self.slot].update(k, v)
        return (k, v) if self.window is None else (k[..., -self.window :, :], v[..., -self.window :, :])

    def visible(self, queries: int, keys: int) -> Tensor | None:
        """The mask for so many queries and keys."""
        if self.mask is None:
            return None
        return self.mask[..., -queries:, -keys:] if self.mask.shape[-2] > 1 else self.mask[..., -keys:]

    def allowed(self, queries: int, keys: Tensor) -> Tensor | None:
        """Which of the keys (rows, tokens, width) each of the last so many tokens sees: (rows or 1, queries, keys)."""
        total = keys.shape[-2]
        mask = self.visible(queries, total)
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > MASKED
            return seen[:, 0].expand(-1, queries, -1)
        if not self.causal or queries == 1:
            return None
        return torch.ones(1, queries, total, dtype=torch.bool, device=keys.device).tril(total - queries)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention of (rows, heads, tokens, width) to the tokens that the block's own sees, and to those before."""
        p = dropout if self.training else 0.0
        if self.rotary is not None:
            q, k = rotated(q, *self.rotary), rotated(k, *self.rotary)
        k, v = self.recall(k, v)
        mask = self.visible(q.shape[-2], k.shape[-2])
        if mask is not None and mask.shape[-1] < k.shape[-2]:
            k, v = k[..., -mask.shape[-1] :, :], v[..., -mask.shape[-1] :, :]
        if self.causal and mask is None and q.shape[-2] == k.shape[-2]:  # a branch: Dynamo has no flags of sizes
            return _attention(q, k, v, None, p, causal=True)
        return _attention(q, k, v, mask, p)

    def attend_memory(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention to the memory."""
        return _attention(q, k, v, self.memory_mask, dropout if self.training else 0.0)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        """`x` with entries dropped, in training."""
        return F.dropout(x, dropout, self.training) if dropout else x


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool = False) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (rows, heads, tokens, width) turned by every so many of the model's angles, in halves.

    The angles of a head of d numbers are given d wide, twice over; a narrower head takes them evenly spread.
    """
    pairs, half = x.shape[-1] // 2, cos.shape[-1] // 2
    step = max(1, half // pairs)
    pairs = min(pairs, half)
    cos, sin = (a[..., : pairs * step : step].to(x.dtype).unsqueeze(1) for a in (cos, sin))
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


# --- hooks ---


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook where a stack begins, and in front of a last block that a network joins."""
    if not torch.compiler.is_compiling():
        fallback.ran_eagerly()
    for part in _parts(module, "entry"):
        h = args[0] if args else next(iter(kwargs.values()))
        side, run = part.graft.side, part.run
        call = _call(part, module, args, kwargs)
        run.states[side.stack] = side.then(None, part.tap(h), call, part.tensors())
        run.calls[side.stack] = call
    for part in _parts(module, "late"):
        name = None if args else next(iter(kwargs))
        y = _joined(part, args[0] if name is None else kwargs[name])
        args, kwargs = ((y, *args[1:]), kwargs) if name is None else (args, kwargs | {name: y})
    return args, kwargs


def behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a block with a rung, and of the module whose output a network joins."""
    if not torch.compiler.is_compiling():
        fallback.ran_eagerly()
    y = output if isinstance(output, Tensor) else output[0]
    for part in _parts(module, "rung"):
        side, run = part.graft.side, part.run
        if (s := run.states.get(side.stack)) is not None:
            call = _call(part, module, args, kwargs)
            run.states[side.stack] = side.then(s, part.tap(y), call, part.tensors())
            run.calls[side.stack] = call
    new = y
    for part in _parts(module, "memory", "end", "head"):
        new = _joined(part, new)
    if new is y:
        return output
    return new if isinstance(output, Tensor) else (new, *output[1:])


def _joined(part: SidePart, y: Tensor) -> Tensor:
    """A stream at the end of a network, which is over with this."""
    side, run = part.graft.side, part.run
    assert side is not None
    s = run.states.pop(side.stack, None)
    if s is None:  # a norm that is called by itself
        return y
    s = side.then(s, run.calls.pop(side.stack), part.tensors())
    if side.part == "memory":
        run.memory = s
        return y
    if side.reads and not run.within:
        run.memory = None
    return part(y, s)


def _parts(module: nn.Module, *kinds: str) -> list[Any]:
    held: Any = module._modules[ADAPTERS]
    return [a for a in held.values() if isinstance(a, SidePart) and a.graft.side.part in kinds]  # type: ignore[union-attr]


def opened(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model with side networks: nothing is left of an earlier forward."""
    for run in _runs(model):
        run.states.clear()
        run.calls.clear()
        run.memory, run.within = None, True
        encoded = kwargs.get("encoder_outputs")
        if isinstance(encoded, dict):
            run.memory = encoded.get(MEMORY)


def closed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a model with side networks."""
    for run in _runs(model):
        run.states.clear()
        run.calls.clear()
        run.memory, run.within = None, False


def handed_on(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of an encoder that is called by itself: its output takes along what its side network made."""
    for run in _runs(owner):
        if not run.within and run.memory is not None and isinstance(output, dict):
            output[MEMORY] = run.memory
    return output


def _runs(module: nn.Module) -> list[Run]:
    return module._rewrite_runs  # type: ignore[return-value]


# --- what a block was told ---

_MASK = re.compile(r"(?:attention|attn|self_attention|self_attn)_mask|mask")


def _call(part: SidePart, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What a block was told, read off its arguments; of any other module nothing but what the network carries."""
    side, run = part.graft.side, part.run
    assert side is not None
    bound = {**dict(zip(part.arguments, args, strict=False)), **kwargs}
    mask = next((v for n, v in bound.items() if _MASK.fullmatch(n) and isinstance(v, Tensor)), None)
    cache = _cache(bound)
    call = Call(side.causal, _four(mask, side.causal, bound), None, cache, side.slot, training=part.training)
    rotary = bound.get("position_embeddings")
    if isinstance(rotary, tuple) and len(rotary) == 2 and rotary[0].ndim == 3:
        call.rotary = rotary
    if side.wiring is not None:
        call.rows = Rows(side.wiring, part.layers, next(iter(bound.values())), call.mask)
    if cache is not None:
        _prepare(cache, side.slot)
        call.window = getattr(cache.layers[side.layer], "sliding_window", None) if call.mask is None else None
    if side.reads and side.part == "rung":
        encoded = bound.get("encoder_hidden_states")
        fits = run.memory is not None and (encoded is None or encoded.shape[:2] == run.memory.shape[:2])
        if not fits:
            raise RewriteError(
                f"{part.graft.label} reads the side network of the encoder, which did not run: call the model with "
                "input_ids, or with encoder_outputs of its own encoder"
            )
        call.memory = run.memory
        call.memory_mask = _four(bound.get("encoder_attention_mask"), False, bound)
    return call


def _four(mask: Any, causal: bool, bound: Mapping[str, Any]) -> Tensor | None:
    """A mask in four dimensions; one of (rows, keys) says which tokens are there at all."""
    if not isinstance(mask, Tensor) or mask.ndim == 4:
        return mask if isinstance(mask, Tensor) else None
    if mask.ndim != 2:
        raise RewriteError(f"a side network cannot read an attention mask of {mask.ndim} dimensions")
    keys = mask.bool()[:, None, None, :]
    if not causal:
        return keys
    queries = next(v for v in bound.values() if isinstance(v, Tensor)).shape[-2]
    total = mask.shape[-1]
    before = torch.ones(queries, total, dtype=torch.bool, device=mask.device).tril(total - queries)
    return keys & before


def _cache(bound: Mapping[str, Any]) -> Any:
    """The keys and values of past tokens among the arguments of a block, under whatever name."""
    for value in bound.values():
        value = getattr(value, "self_attention_cache", value)
        if hasattr(value, "layers") and hasattr(value, "get_seq_length"):
            return value
    return None


def _prepare(cache: Any, slot: int) -> None:
    """See to it that a cache has a layer for us."""
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= slot:
        if cache.layers and getattr(cache.layers[0], "max_cache_len", None) is not None:
            raise RewriteError("side networks need a cache that grows (cache_implementation='dynamic')")
        cache.layers.append(DynamicLayer())


# --- on and off a model ---


def hook(model: nn.Module, graft: Graft, part: SidePart, runs: dict[str, Run]) -> None:
    """Let a part of a side network take hold of its module, and the model open and close every forward."""
    side, module = graft.side, model.get_submodule(graft.path)
    assert side is not None
    part.run = runs.setdefault(side.net, Run())
    if side.wiring is not None:
        part.__dict__["layers"] = layers_of(module, graft.path, side.wiring)
    part.arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if side.part in ("entry", "late") and before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
    if side.part not in ("entry", "late") and behind not in module._forward_hooks.values():
        module.register_forward_hook(behind, with_kwargs=True)
    if _RUNS not in model.__dict__:
        model.__dict__[_RUNS] = []
        model.register_forward_pre_hook(opened, with_kwargs=True)
        model.register_forward_hook(closed, with_kwargs=True)
    if part.run not in _runs(model):
        _runs(model).append(part.run)
    owner = model.get_submodule(side.stack.rpartition(".")[0])
    if side.part == "memory":
        owner.__dict__[_RUNS] = _runs(model)
        owner.register_forward_hook(handed_on, with_kwargs=True)


_RUNS = "_rewrite_runs"
HOOKS = (before, behind, opened, closed, handed_on)


def unhook(model: nn.Module) -> None:
    """Take off what `hook` marked modules with."""
    for module in model.modules():
        module.__dict__.pop(_RUNS, None)


@torch.no_grad()
def start(model: nn.Module, parts: Sequence[SidePart]) -> None:
    """Fill the tensors of the side networks that start from the model's own weights."""
    clauses: dict[Any, list[SidePart]] = {}
    for part in parts:
        if part.graft.side.start is not None:  # type: ignore[union-attr]
            clauses.setdefault(part.graft.side.start, []).append(part)  # type: ignore[union-attr]
        if part.graft.side.wiring is not None:  # type: ignore[union-attr]
            check(model, part.graft)
    for fill, members in clauses.items():
        fill([_weights(model, p.graft) for p in members], [p.tensors() for p in members])


def _weights(model: nn.Module, graft: Graft) -> dict[str, Tensor]:
    assert graft.side is not None
    found: dict[str, Tensor] = {}
    for role, source in graft.side.sources.items():
        matrix = source.map.matrix(getattr(model.get_submodule(source.path), source.tensor).detach())
        found[role] = matrix if source.rows is None else source.rows.take(matrix)
    return found
