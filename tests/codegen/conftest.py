"""What the tests against bitsandbytes share: its PyTorch backend, whichever processor runs them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture
def bnb(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bitsandbytes, dequantising with its PyTorch backend.

    On CPU tensors bitsandbytes 0.50.2 (backends/cpu/ops.py) prefers a native `dequantize_4bit`.  On a processor with
    AVX-512 BF16 that one is wrong where a block crosses the end of a row: for rows of n values, n a multiple of 16,
    it takes the scale at `row * (n // blocksize) + column // blocksize`, which is another block's unless
    `blocksize` divides n.  A short last block is one case of it.  It also flushes subnormal results to zero.
    """
    module = pytest.importorskip("bitsandbytes")
    key = torch._C.DispatchKey.CompositeExplicitAutograd  # where bitsandbytes registers the kernels of every device
    for name in ("dequantize_4bit", "dequantize_blockwise"):
        packet = getattr(torch.ops.bitsandbytes, name)
        monkeypatch.setattr(packet, "default", functools.partial(packet.default._op_dk, key))
    # The PyTorch backend compiles itself for each shape; the arithmetic is the same without.
    with torch.compiler.set_stance("force_eager"):
        yield module
