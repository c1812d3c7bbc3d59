"""Which elements dropout drops: a function of a seed, the row and the column, that every kernel follows to the bit.

x is taken as a matrix of rows (its leading dimensions, flattened) and columns (its last).  The element at (row,
column) has a 16-bit number

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

Tensor = torch.Tensor

COLUMNS = 8  # that share a call of the generator
ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_NUMBERS = 1 << 16


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
    row = torch.arange(rows, device=seed.device)[:, None]
    block = torch.arange(-(-columns // COLUMNS), device=seed.device)
    words = philox((block, row, torch.zeros_like(row), 0), (seed & _WORD, seed >> 32 & _WORD))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(1)[:, :columns] >= threshold(p)
