"""Dropout whose mask is a function of a seed: computed where it is needed, forward and backward, never stored.

- `rewrite::draw(like)`                              a fresh seed on the device of `like`, from PyTorch's generator
- `rewrite::dropout(x, seed, p)`                     the dropped x; keeps the seed for backward, 8 bytes
- `rewrite::dropped_linear(x, A, seed, ranks, p)`    `linear(dropout(x), A)`, without the dropped copy of x

**The definition**, which every kernel follows to the bit.  x is taken as a matrix of rows (its leading dimensions,
flattened) and columns (its last).  The element at (row, column) has a 16-bit number

    words   = Philox4x32, 7 rounds, of counter (column // 8, row, 0, 0) and key (seed mod 2**32, seed div 2**32)
    number  = words[column % 8 // 2], its low half where the column is even, its high half where it is odd

so eight columns that follow one another share one call, and in memory, little-endian, the four words are their eight
numbers in order.  The element is dropped where number < T, with T = round(p * 2**16), at most 2**16 - 1; what is kept
is multiplied by 1 / (1 - T / 2**16), so that the mean is that of x whatever p is.  A mask depends on the seed, the
row, the column and p alone, not on the device, the dtype or the order of the work.  Rows are fewer than 2**32.

Philox4x32 is that of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; 7 rounds pass their tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

Tensor = torch.Tensor
_lib = torch.library.Library("rewrite", "FRAGMENT")
_lib.define("draw(Tensor like) -> Tensor")
_lib.define("dropout(Tensor x, Tensor seed, float p) -> Tensor")
_lib.define("dropped_linear(Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p) -> Tensor")
_lib.define("dropped_linear_core(Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p) -> Tensor")
_lib.define(
    "dropped_linear_gradients(Tensor dh, Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p, bool input)"
    " -> (Tensor, Tensor)"
)

COLUMNS = 8  # that share a call of the generator
ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_NUMBERS = 1 << 16
_SEEDS = (1 << 63) - 1


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor | int], rounds: int = ROUNDS) -> list[Tensor]:
    """The four words of Philox4x32 for counters and keys of 32 bits, held in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2**64, as signed numbers
        c0, c2 = (second >> 32 & _WORD) ^ c1 ^ k0, (first >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = k0 + WEYL[0] & _WORD, k1 + WEYL[1] & _WORD
    return [c0, c1, c2, c3]  # type: ignore[list-item]  # counters of numbers alone are of no use


def threshold(p: float) -> int:
    """Of 2**16 numbers, how many drop an element."""
    return min(round(p * _NUMBERS), _NUMBERS - 1)


def scale(p: float) -> float:
    """What a kept element is multiplied by."""
    return _NUMBERS / (_NUMBERS - threshold(p))


def kept(rows: int, columns: int, seed: Tensor, p: float) -> Tensor:
    """The mask of a matrix, bool (rows, columns), true where an element is kept; seed (1,) int64.

    >>> kept(2, 3, torch.tensor([0]), 0.5).tolist()
    [[True, False, False], [False, True, True]]
    """
    numbers = dict(dtype=torch.int64, device=seed.device)
    row = torch.arange(rows, **numbers)[:, None]
    block = torch.arange(-(-columns // COLUMNS), **numbers)
    words = philox((block, row, torch.zeros_like(row), 0), (seed & _WORD, seed >> 32 & _WORD))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(1)[:, :columns] >= threshold(p)


def _draw(like: Tensor) -> Tensor:
    return torch.randint(_SEEDS, (1,), dtype=torch.int64, device=like.device)


def _masked(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The elements of a matrix that are kept, zero elsewhere."""
    return torch.where(kept(*x.shape, seed, p), x, x.new_zeros(()))


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return (_masked(_rows(x), seed, p) * scale(p)).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _dropout_setup(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx, dy):
    return torch.ops.rewrite.dropout(dy, *ctx.saved_tensors, ctx.p), None, None


def dropped_linear(x: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]) -> Tensor:
    """`h = [linear(dropout(x, seed_i, p_i), A_i)]` for factors that share x, each with a mask of its own.

    x (..., d_in); A (sum of ranks, d_in), the factors one above the other; seed (n,); returns (..., sum of ranks).
    Follows autocast.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, A = (t if t.dtype in (dtype, torch.float64) else t.to(dtype) for t in (x, A))
    elif A.dtype != x.dtype:
        A = A.to(x.dtype)
    return torch.ops.rewrite.dropped_linear_core(x, A, seed, ranks, p)


def _linear(x: Tensor, A: Tensor, seed: Tensor, ranks: Sequence[int], p: Sequence[float]) -> Tensor:
    rows = _rows(x)
    h = x.new_empty(*x.shape[:-1], A.shape[0])
    for part, Ai, si, pi in zip(_rows(h).split(ranks, -1), A.split(ranks), seed.split(1), p, strict=True):
        torch.mul(F.linear(_masked(rows, si, pi), Ai), scale(pi), out=part)
    return h


def _linear_gradients(dh, x, A, seed, ranks, p, input):
    rows, dh = _rows(x), _rows(dh)
    dA, dx = torch.empty_like(A), rows.new_zeros(rows.shape if input else (0,))
    for part, di, Ai, si, pi in zip(
        dA.split(ranks), dh.split(ranks, -1), A.split(ranks), seed.split(1), p, strict=True
    ):
        keep = kept(*rows.shape, si, pi)
        torch.mul(di.t() @ torch.where(keep, rows, rows.new_zeros(())), scale(pi), out=part)
        if input:
            dx += torch.where(keep, (di @ Ai) * scale(pi), rows.new_zeros(()))
    return (dx.view(x.shape) if input else dx), dA


def _linear_setup(ctx, inputs, output):
    x, A, seed, ctx.ranks, ctx.p = inputs
    ctx.save_for_backward(x, A, seed)


def _linear_backward(ctx, dh):
    need_x, need_A, *_ = ctx.needs_input_grad
    dx, dA = torch.ops.rewrite.dropped_linear_gradients(dh, *ctx.saved_tensors, ctx.ranks, ctx.p, need_x)
    return dx if need_x else None, dA if need_A else None, None, None, None


_lib.impl("draw", _draw, "CompositeImplicitAutograd")
_lib.impl("dropout", _dropout, "CompositeExplicitAutograd")
_lib.impl("dropped_linear", dropped_linear, "CompositeImplicitAutograd")
_lib.impl("dropped_linear_core", _linear, "CompositeExplicitAutograd")
_lib.impl("dropped_linear_gradients", _linear_gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("rewrite::dropout", lib=_lib)
def _dropout_fake(x, seed, p):
    return x.new_empty(x.shape)


@torch.library.register_fake("rewrite::dropped_linear_core", lib=_lib)
def _linear_fake(x, A, seed, ranks, p):
    return x.new_empty(*x.shape[:-1], A.shape[0])


@torch.library.register_fake("rewrite::dropped_linear_gradients", lib=_lib)
def _linear_gradients_fake(dh, x, A, seed, ranks, p, input):
    return x.new_empty(x.shape if input else (0,)), torch.empty_like(A)


torch.library.register_autograd("rewrite::dropout", _dropout_backward, setup_context=_dropout_setup, lib=_lib)
torch.library.register_autograd("rewrite::dropped_linear_core", _linear_backward, setup_context=_linear_setup, lib=_lib)


@register_flop_formula(torch.ops.rewrite.dropped_linear_core)
def _linear_flops(x, A, *_, **__) -> int:
    return 2 * torch.Size(x[:-1]).numel() * A[0] * A[1]


@register_flop_formula(torch.ops.rewrite.dropped_linear_gradients)
def _linear_gradients_flops(dh, x, A, seed, ranks, p, input, **_) -> int:
    return (2 if input else 1) * _linear_flops(x, A)
