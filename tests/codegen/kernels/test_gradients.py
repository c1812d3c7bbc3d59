"""Both gradients of a branch from one read of dy: against float64, the same bits whatever the split's order."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen.kernels import gradients
from rewrite.codegen.kernels.gradients import Split
from tests.codegen.kernels.bounds import assert_rounded

Tensor = torch.Tensor
OP = torch.ops.rewrite.low_rank_gradients.default


def check(found: tuple[Tensor, Tensor], dy: Tensor, h: Tensor, B: Tensor, scale: float) -> None:
    wide = [(t.double(), t.double().abs()) for t in (dy, h, B)]
    for out, by in zip(found, (lambda y, h, B: y @ B, lambda y, h, B: y.t() @ h), strict=True):
        exact, magnitude = (by(*(pair[i] for pair in wide)) for i in range(2))
        assert_rounded(out, scale * exact, abs(scale) * magnitude, max(dy.shape) + 1)


SIZES = [(150, 200, 5), (64, 256, 16), (1, 7, 1), (0, 24, 3), (129, 130, 33)]
CASES = [(size, torch.bfloat16, None) for size in SIZES]
CASES += [(SIZES[0], torch.float16, None), (SIZES[0], torch.bfloat16, Split(128, 100))]


@pytest.mark.parametrize(("sizes", "dtype", "split"), CASES, ids=str)
def test_both_gradients(sizes, dtype, split, device):
    M, N, rank = sizes
    dy, h, B = (torch.randn(*s, device=device).to(dtype) for s in ((M, N), (M, rank), (N, rank)))
    found = gradients.low_rank_gradients(dy, h, B, -1.5, split)
    check(found, dy, h, B, -1.5)
    again = gradients.low_rank_gradients(dy, h, B, -1.5, split)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_slice_of_dy_and_stacked_h(device):
    dy, h = (torch.randn(70, size, device=device).bfloat16() for size in (300, 24))
    B = torch.randn(130, 8, device=device).bfloat16()
    check(gradients.low_rank_gradients(dy[:, 40:170], h[:, 8:16], B, 2.0), dy[:, 40:170], h[:, 8:16], B, 2.0)


def test_splits_keep_parts_small():
    for M, N, programs in ((8192, 4096, 132), (8192, 14336, 132), (8192, 1024, 108)):
        split = Split.of(M, N, 16, programs)
        columns, rows = split.parts(M, N)
        assert 0.8 * programs <= columns * rows <= programs
        assert split.traffic(M, N, 16) <= 2 * M * N / 2  # half of what a second read of dy would take


def test_reasons():
    def of(M: int, N: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [torch.empty(s, dtype=dtype, device="meta") for s in ((M, N), (M, rank), (N, rank))]

    assert gradients.supports(*of(8192, 4096, 16)) is None
    assert gradients.supports(*of(8192, 14336, 32)) is None
    assert "the parts would take" in str(gradients.supports(*of(8192, 4096, 128)))
    assert gradients.supports(*of(8192, 4096, 16, torch.float32)) == "float32: cuBLAS is faster"
    assert gradients.supports(*of(8, 4096, 16)) == "dy of 65,536 bytes"
    assert gradients.supports(*of(8192, 4096, 200)) == "rank 200, not in 1 ... 128"
    dy, h, B = of(8192, 4096, 16)
    assert gradients.supports(dy, h.float(), B) == "operands of several dtypes"
    assert gradients.supports(dy.t(), h, B) == "rows with gaps between their elements"


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_the_operator(shape, scale):
    dy = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    h = torch.randn(*shape[:-1], 3, dtype=torch.float64, requires_grad=True)
    B = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    dh, dB = OP(dy, h, B, scale)
    torch.testing.assert_close(dh, scale * dy @ B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dB, scale * dy.flatten(0, -2).t() @ h.flatten(0, -2), rtol=1e-12, atol=1e-12)
    torch.library.opcheck(OP, (dy, h, B, scale))
    if dy.numel():
        torch.autograd.gradcheck(lambda *t: OP(*t, scale), (dy, h, B))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4096, 4096, 16), (2048, 14336, 32), (4096, 1024, 8)], ids=str)
def test_on_a_gpu_at_the_sizes_of_models(sizes):
    M, N, rank = sizes
    dy, h, B = (torch.randn(*s, device="cuda").bfloat16() for s in ((M, N), (M, rank), (N, rank)))
    assert gradients.supports(dy, h, B) is None
    found = OP(dy, h, B, 2.0)
    check(found, dy, h, B, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(found, OP(dy, h, B, 2.0), strict=True))
