"""Text -> blocks of tokens, split into training and held-out ones.  Deterministic: no order comes from the disk.

A block is `length` tokens in a row.  Nothing here knows a model.
"""

from __future__ import annotations

import codecs
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rewrite.errors import RewriteError

_HELD_OUT = 10  # one block of so many is held out
_PIECE = 1 << 16  # characters that a tokenizer gets at once
_PROBE = 8192  # bytes that are searched for a NUL: text has none


@dataclass(frozen=True)
class Text:
    """One document, and how many of its bytes were not valid in its encoding (each is replaced by U+FFFD)."""

    name: str
    text: str
    replaced: int = 0


@dataclass(frozen=True)
class Blocks:
    """Token blocks (count, length), int64: `train` to learn from, `held` never seen in training."""

    train: torch.Tensor
    held: torch.Tensor


def read(source: str | Path) -> list[Text]:
    """The texts of a file, or of every text file below a folder, in the order of their names.

    Encodings: UTF-16 and UTF-8 by their marks, otherwise UTF-8 with what is invalid replaced.  In a folder, hidden
    and binary files are passed over.  Raises `RewriteError` when there is nothing to read.
    """
    place = Path(source)
    try:
        if place.is_dir():
            found = [text for file in _files(place) if (text := _decoded(file, str(file.relative_to(place))))]
        elif text := _decoded(place, place.name):
            found = [text]
        else:
            raise RewriteError(f"{place} is not a text file: its first {_PROBE} bytes hold a NUL")
    except FileNotFoundError as error:
        raise RewriteError(f"no such text file or folder: {error.filename}") from error
    except OSError as error:
        raise RewriteError(f"cannot read the text in {place}: {error}") from error
    found = [text for text in found if text.text.strip()]
    if not found:
        raise RewriteError(f"{place} holds no text: give a text file, or a folder with some in it")
    return found


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _decoded(file: Path, name: str) -> Text | None:
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data[:_PROBE]:
        return None
    else:
        encoding = "utf-8-sig"
    text = data.decode(encoding, errors="replace")
    return Text(name, text, max(0, text.count("\ufffd") - data.count("\ufffd".encode())))


def english() -> list[Text]:
    """The prose of Python's language reference, from `pydoc_data.topics`; a paragraph that repeats is taken once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].split("\n\n") if p not in seen]
        seen.update(paragraphs)
        texts.append(Text(name, "\n\n".join(dict.fromkeys(paragraphs))))
    return texts


def python_source() -> list[Text]:
    """The modules at the top of the standard library; not its packages, so nothing of `english()` is among them.

    Raises `RewriteError` where Python is installed without its source.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [text for file in sorted(folder.glob("*.py")) if (text := _decoded(file, file.name))]
    if not found:
        raise RewriteError(f"this Python comes without its source in {folder}: give a --model")
    return found


def tokenise(texts: Iterable[Text], tokenizer: Any, progress: str = "tokenise") -> torch.Tensor:
    """All texts one after the other as token ids (count,), int64; `tokenizer` is a Hugging Face one."""
    pieces = [piece for text in texts for piece in _pieces(text.text)]
    bar = tqdm(pieces, desc=progress, unit="piece", delay=2, leave=False)
    ids = [tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in bar]
    return torch.tensor([each for row in ids for each in row], dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, about `_PIECE` characters at a time."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:stop]
        start = stop


def split(tokens: torch.Tensor, length: int, batch: int, what: str) -> Blocks:
    """Cut tokens into blocks and hold out one in ten, evenly spread.

    At least one block is held out and at least `batch` are left to train on; raises `RewriteError` that says
    how much text that takes.
    """
    count, needed = len(tokens) // length, length * (batch + 1)
    if len(tokens) < needed:
        raise RewriteError(
            f"{what} has {len(tokens):,} tokens, and batches of {batch} x {length} need at least {needed:,}: "
            "give more text, or a smaller --batch or --length"
        )
    blocks = tokens[: count * length].view(count, length)
    held = spread(count, min(max(1, count // _HELD_OUT), count - batch))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(held)] = True
    return Blocks(blocks[~mask], blocks[mask])


def spread(count: int, take: int) -> Sequence[int]:
    """`take` of the numbers below `count`, evenly spread.

    >>> list(spread(10, 3))
    [1, 5, 8]
    """
    return [(2 * i + 1) * count // (2 * take) for i in range(take)]


def batches(blocks: torch.Tensor, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches (size, length): every block once per epoch, in an order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:size]]
        order = order[size:]
