"""Dropout kernels: masks bit for bit those of `codegen.masks`, products and gradients against float64."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen import masks
from rewrite.codegen.kernels import dropout
from tests.codegen.kernels.bounds import assert_rounded

Tensor = torch.Tensor
OPS = torch.ops.rewrite
SEED = 0x1234_5678_9ABC_DEF0
CASES = {
    "one": ((5,), (0.3,)),
    "three, one without dropout": ((3, 16, 1), (0.5, 0.0, 0.05)),
}


def seeds(count: int, device: torch.device | str) -> Tensor:
    return torch.tensor([SEED - 7 * i for i in range(count)], dtype=torch.int64, device=device)


def keeps(M: int, K: int, seed: Tensor, p: tuple[float, ...]) -> list[Tensor]:
    return [masks.kept(M, K, si, pi) for si, pi in zip(seed.split(1), p, strict=True)]


@pytest.mark.parametrize("sizes", [(37, 91), (1, 8), (70, 520), (0, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dropout_bit_for_bit(sizes, dtype, device):
    x, seed = torch.randn(*sizes, device=device).to(dtype), seeds(1, device)
    expected = torch.where(masks.kept(*sizes, seed, 0.3), x, x.new_zeros(())) * masks.scale(0.3)
    assert torch.equal(dropout.dropout(x, seed, 0.3), expected)


@pytest.mark.parametrize("sizes", [(37, 91), (130, 24), (1, 300)], ids=str)
def test_masks_of_all_kernels(sizes, device):
    """With ones, and p = 1/2, every kernel shows the mask itself."""
    (M, K), p, seed = sizes, (0.5,), seeds(1, device)
    mask = masks.kept(M, K, seed, 0.5)
    ones = torch.ones(max(M, K), 1, device=device).bfloat16()
    dx = torch.full((M, K), float("nan"), device=device).bfloat16()
    dropout.input_gradient(ones[:M], ones[:K].t().contiguous(), seed, (1,), p, dx, add=False)
    assert torch.equal(dx, (2.0 * mask).bfloat16())
    rows = torch.arange(M, device=device).remainder(64)  # one row of x in a column of dh, and of the identity
    for first in range(0, M, 64):
        pick = torch.zeros(M, 64, device=device).bfloat16()
        here = slice(first, min(first + 64, M))
        pick[here, : here.stop - first] = torch.eye(64, device=device)[rows[here]][:, : here.stop - first].bfloat16()
        found = dropout.gradient(pick, torch.ones_like(dx), seed, (64,), p)
        assert torch.equal(found[: here.stop - first], (2.0 * mask[here]).bfloat16())
    for first in range(0, K, 64):
        pick = torch.zeros(64, K, device=device).bfloat16()
        width = min(64, K - first)
        pick[:width, first : first + width] = torch.eye(width, device=device).bfloat16()
        found = dropout.linear(torch.ones_like(dx), pick, seed, (64,), p)
        assert torch.equal(found[:, :width], (2.0 * mask[:, first : first + width]).bfloat16())


@pytest.mark.parametrize(("ranks", "p"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("sizes", [(70, 264), (1, 40), (0, 8)], ids=str)
@pytest.mark.parametrize("chunk", [None, 128], ids=str)
def test_products(ranks, p, sizes, chunk, device):
    (M, K), total = sizes, sum(ranks)
    x, A, dh = (torch.randn(*s, device=device).bfloat16() for s in ((M, K), (total, K), (M, total)))
    seed = seeds(len(ranks), device)
    found = [dropout.linear(x, A, seed, ranks, p, chunk), dropout.gradient(dh, x, seed, ranks, p, chunk)]
    dx = x.clone()
    dropout.input_gradient(dh, A, seed, ranks, p, dx, add=True)
    results = [[*expected(x, A, dh, seed, ranks, p, absolute)] for absolute in (False, True)]
    for out, exact, magnitude in zip([*found, dx], *results, strict=True):
        assert_rounded(out, exact, magnitude, terms=max(M, K, total) + 1)


def expected(x, A, dh, seed, ranks, p, absolute):
    """h, dA and x + dx in float64, or the sums of absolute values."""
    x, A, dh = (t.double().abs() if absolute else t.double() for t in (x, A, dh))
    h, dA, dx = [], [], x.clone()
    for mask, Ai, di, pi in zip(keeps(*x.shape, seed, p), A.split(ranks), dh.split(ranks, 1), p, strict=True):
        factor = masks.scale(pi)
        h.append(factor * (x * mask) @ Ai.t())
        dA.append(factor * di.t() @ (x * mask))
        dx += factor * mask * (di @ Ai)
    return torch.cat(h, 1), torch.cat(dA), dx


def test_rows_with_gaps(device):
    x, A = torch.randn(19, 200, device=device).bfloat16()[:, 32:128], torch.randn(4, 96, device=device).bfloat16()
    dh, seed = torch.randn(19, 9, device=device).bfloat16()[:, 2:6], seeds(1, device)
    arguments = seed, (4,), (0.3,)
    assert torch.equal(dropout.linear(x, A, *arguments), dropout.linear(x.contiguous(), A, *arguments))
    assert torch.equal(
        dropout.gradient(dh, x, *arguments), dropout.gradient(dh.contiguous(), x.contiguous(), *arguments)
    )
    assert torch.equal(dropout.dropout(x, seed, 0.3), dropout.dropout(x.contiguous(), seed, 0.3))


def test_reasons():
    x, A = torch.randn(4, 40).bfloat16(), torch.randn(6, 40).bfloat16()
    assert dropout.supports(x, A, (6,), (0.1,)) is None
    assert dropout.supports(x.float(), A.float(), (6,), (0.1,)) == "float32: cuBLAS is faster"
    assert "several dtypes" in str(dropout.supports(x, A.float(), (6,), (0.1,)))
    assert "gaps" in str(dropout.supports(x, torch.randn(40, 6).bfloat16().t(), (6,), (0.1,)))
    wide = torch.randn(144, 40).bfloat16()
    assert dropout.supports(x, wide, (128, 16), (0.1, 0.1)) == "ranks 128, 16: not in 1 ... 128 together"
    assert "float64" in str(dropout.supports_dropout(x.double(), 0.1))


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "p"), CASES.values(), ids=CASES)
def test_on_a_gpu_the_operators_at_the_sizes_of_models(ranks, p):
    M, K, total = 2048, 4096, sum(ranks)
    x, A, dh = (torch.randn(*s, device="cuda").bfloat16() for s in ((M, K), (total, K), (M, total)))
    seed = seeds(len(ranks), "cuda")
    h = OPS.dropped_linear_core(x, A, seed, ranks, p)
    dx, dA = OPS.dropped_linear_gradients(dh, x, A, seed, ranks, p, True)
    exact, magnitude = ([*expected(x, A, dh, seed, ranks, p, absolute)] for absolute in (False, True))
    exact[2] -= x.double()
    for out, value, size in zip((h, dA, dx), exact, magnitude, strict=True):
        assert_rounded(out, value, size, terms=M + K)
    again = OPS.dropped_linear_gradients(dh, x, A, seed, ranks, p, True)
    assert torch.equal(dA, again[1])
    dropped = torch.where(masks.kept(M, K, seed[:1], 0.3), x, x.new_zeros(())) * masks.scale(0.3)
    assert torch.equal(OPS.dropout(x, seed[:1], 0.3), dropped)
