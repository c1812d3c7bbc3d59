"""The checks of interpreted launches find what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rewrite.codegen.kernels import interpret, template
from rewrite.codegen.kernels.gradients import SumOfParts
from rewrite.codegen.kernels.kernel import Config, _Launch

pytestmark = pytest.mark.skipif(not interpret.active(), reason="kernels are not interpreted here")

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def shift(x, out, n, by, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at + by, at < n), at < n)


@triton.jit
def total(x, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N) // 2, tl.load(x + tl.arange(0, N)))
"""


@dataclass(frozen=True)
class Own(SumOfParts):
    """Functions of this module's own."""

    which: str = ""

    @property
    def function(self) -> Any:
        return getattr(template.load("watched", SOURCE), self.which)


def run(name: str, arguments: Sequence[Any], programs: int = 1) -> None:
    _Launch(Own((1.0,), torch.float32, name), Config.of(N=16), torch.device("cpu"), (programs,))(arguments)


def test_what_is_right_passes():
    x, out = torch.randn(20), torch.zeros(20)
    run("shift", (x, out, 20, 0), programs=2)
    assert torch.equal(out, x)
    run("shift", (out, out, 20, 0), programs=2)  # in place


def test_a_load_and_a_store_past_their_tensor():
    memory = torch.zeros(64)
    for arguments in (
        (memory[:20], memory[32:], 21, 0),
        (memory[32:], memory[:20], 21, 0),
        (memory[8:28], memory[32:], 20, -1),
    ):
        with pytest.raises(Exception, match="past its arguments"):
            run("shift", arguments, programs=2)


def test_programs_that_share_what_one_stores():
    x = torch.zeros(64)
    with pytest.raises(Exception, match=r"\[\(0, 0, 0\), \(1, 0, 0\)\] share a stored element"):
        run("shift", (x, x, 32, 1), programs=2)
    with pytest.raises(Exception, match="stores an element twice at once"):
        run("total", (x, x[32:]))
