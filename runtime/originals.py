"""Keeps base tensors that an attachment replaces or trains, bit for bit, out of memory: one temporary file each.

The files vanish with the last reference (a model, its copies) or at interpreter exit.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rewrite.errors import RewriteError


class Originals:
    """A read-only store of tensors by name, on disk.

    >>> store = Originals()
    >>> store.keep("lm_head.weight", torch.ones(2, 3))
    >>> store.restore("lm_head.weight").shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[str, Path] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        return self  # what is kept never changes, so copies of a model share it

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Store a copy of `tensor`, if it has numbers; raises `RewriteError` when the disk cannot hold it."""
        if tensor.device.type == "meta":
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rewrite-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        file = self._folder / f"{len(self._files)}.safetensors"
        try:
            save_file({"tensor": tensor.detach().cpu().contiguous()}, file)
        except Exception as error:
            raise RewriteError(
                f"cannot keep the original of {name} in {self._folder}: {error}. Point TMPDIR at a disk with room."
            ) from error
        self._files[name] = file

    def restore(self, name: str) -> torch.Tensor:
        """The tensor as it was kept, on the CPU."""
        try:
            return load_file(self._files[name])["tensor"]
        except (OSError, KeyError) as error:
            raise RewriteError(f"the original of {name} is gone: {error}") from error
