"""A branch and a scale in one pass, and all their gradients in another: the kernels and operators against float64."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen import scaled
from rewrite.codegen.kernels import gradients, linear
from rewrite.codegen.kernels.gradients import Split
from rewrite.codegen.kernels.products import TINY
from tests.codegen.kernels.bounds import assert_rounded

Tensor = torch.Tensor
BRANCH = torch.ops.rewrite.scaled_branch.default
GRADIENTS = torch.ops.rewrite.scaled_branch_gradients.default
SIZES = [(150, 200, 5), (64, 256, 16), (1, 7, 1), (0, 24, 3), (129, 130, 33)]
EPS = torch.finfo(torch.bfloat16).eps


def case(sizes, device) -> tuple[Tensor, ...]:
    M, N, rank = sizes
    dy, y, h, B = (torch.randn(*s, device=device).bfloat16() for s in ((M, N), (M, N), (M, rank), (N, rank)))
    d = torch.randn(N, device=device).bfloat16()
    d[N // 2] = 0.0
    return dy, y, h, B, d


def nonzero(d: Tensor) -> Tensor:
    return torch.where(d == 0, TINY, d.double())


def check_branch(out: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor) -> None:
    y, h, B, d = y.double(), h.double(), B.double(), nonzero(d)
    magnitude = (y.abs() + abs(scale) * h.abs() @ B.abs().t()) * d.abs()
    assert_rounded(out, (y + scale * h @ B.t()) * d, magnitude, h.shape[1] + 2)


def check_gradients(found, dy: Tensor, out: Tensor, h: Tensor, B: Tensor, scale: float, d: Tensor) -> None:
    scaled_dy, dh, dB, dd = found
    assert torch.equal(scaled_dy, (dy.double() * nonzero(d)).to(dy.dtype))  # rounded once
    low = (B.double() * nonzero(d)[:, None]).to(B.dtype).double()  # rounded once too
    wide, h, by = dy.double(), h.double(), scale * nonzero(d)[:, None]
    terms = max(dy.shape) + 2
    assert_rounded(dh, scale * wide @ low, abs(scale) * wide.abs() @ low.abs(), terms)
    assert_rounded(dB, by * (wide.t() @ h), by.abs() * (wide.abs().t() @ h.abs()), terms)
    each = dy.double() * out.double() / nonzero(d)
    assert_rounded(dd, each.sum(0), each.abs().sum(0), terms)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_branch(sizes, device):
    _, y, h, B, d = case(sizes, device)
    total = linear.Sum([h], [B.t()], [-1.5], [0], given=y, factor=d)
    out = torch.full_like(y, torch.nan)
    total.fused(out)
    check_branch(out, y, h, B, -1.5, d)


def test_the_branch_of_a_transposed_sum(device):
    _, y, h, B, d = case((50, 30, 4), device)
    apart = y.t().contiguous().t()
    total = linear.Sum([h], [B.t()], [1.0], [0], given=apart, factor=d)
    assert total.supports() is None
    out = torch.empty_like(y)
    total.fused(out)
    check_branch(out, y, h, B, 1.0, d)


@pytest.mark.parametrize(("sizes", "split"), [*((s, None) for s in SIZES), (SIZES[0], Split(128, 100))], ids=str)
def test_all_gradients(sizes, split, device):
    dy, y, h, B, d = case(sizes, device)
    out = BRANCH(y, h, B, -1.5, d)
    found = gradients.scaled_gradients(dy, out, h, B, -1.5, d, split)
    check_gradients(found, dy, out, h, B, -1.5, d)
    again = gradients.scaled_gradients(dy, out, h, B, -1.5, d, split)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_slice_of_dy(device):
    dy, y, h, B, d = case((70, 130, 8), device)
    wide = torch.randn(70, 300, device=device).bfloat16()
    wide[:, 40:170] = dy
    out = BRANCH(y, h, B, 2.0, d)
    check_gradients(gradients.scaled_gradients(wide[:, 40:170], out, h, B, 2.0, d), dy, out, h, B, 2.0, d)


def test_the_gradient_of_d_is_that_of_what_was_not_rounded(device):
    dy, y, h, B, d = case((150, 200, 5), device)
    out = BRANCH(y, h, B, 0.5, d)
    *_, dd = gradients.scaled_gradients(dy, out, h, B, 0.5, d)
    v = y.double() + 0.5 * h.double() @ B.double().t()  # also where d is 0
    each = dy.double() * v
    # v is rounded twice on its way, as the output of the base product and as the result
    allowed = (each.abs() + dy.double().abs() * y.double().abs()).sum(0) * EPS
    assert bool(((dd.double() - each.sum(0)).abs() <= allowed).all())


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_the_operator(shape, scale):
    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)

    arguments = y, h, B, d = random(*shape), random(*shape[:-1], 3), random(6, 3), random(6)
    torch.testing.assert_close(BRANCH(y, h, B, scale, d), (y + scale * h @ B.t()) * d, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(BRANCH, (y, h, B, scale, d))
    if y.numel():
        torch.autograd.gradcheck(lambda y, h, B, d: BRANCH(y, h, B, scale, d), arguments)


def test_a_scale_of_zero_has_a_gradient():
    y, h, B = (torch.randn(*s, dtype=torch.float64) for s in ((5, 4), (5, 2), (4, 2)))
    d = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    out = BRANCH(y, h, B, 1.0, d)
    assert out.abs().max() < 1e-17
    (found,) = torch.autograd.grad(out.sum(), d)
    torch.testing.assert_close(found, (y + h @ B.t()).sum(0), rtol=1e-12, atol=1e-12)


def test_rows_with_gaps_and_a_scale_in_steps(device):
    dy, y, h, B, d = case((70, 130, 8), device)
    out = BRANCH(y, h, B, 2.0, d)
    gaps = [torch.stack([t, t + 1], -1)[..., 0] for t in (dy, out, h, B, d)]
    assert all(t.stride(-1) == 2 for t in gaps)
    dy_, out_, h_, B_, d_ = gaps
    assert gradients.unscaled(dy_, h_, B_, out_, d_) is None
    check_gradients(gradients.scaled_gradients(dy_, out_, h_, B_, 2.0, d_), dy, out, h, B, 2.0, d)
    found = torch.empty_like(y)
    linear.Sum([h_], [B.t()], [2.0], [0], given=y, factor=d_).fused(found)
    check_branch(found, y, h, B, 2.0, d)


def test_when_gradients_are_left_to_pytorch():
    def of(M: int, N: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        sizes = (M, N), (M, rank), (N, rank), (M, N), (N,)
        return [torch.empty(s, dtype=dtype, device="meta") for s in sizes]

    assert gradients.unscaled(*of(8192, 4096, 16)) is None
    assert gradients.unscaled(*of(8, 4096, 16)) is None  # one launch in place of many
    assert gradients.unscaled(*of(0, 4096, 16)) == "no rows"
    assert gradients.unscaled(*of(8192, 4096, 128)) == "rank 128, not in 1 ... 64"
    assert gradients.unscaled(*of(8192, 4096, 16, torch.float32)) == "float32: cuBLAS is faster"
    dy, h, B, out, d = of(8192, 4096, 16)
    assert gradients.unscaled(dy, h, B, out, d.float()) == "operands of several dtypes"


@pytest.mark.parametrize("N", [1024, 4096, 14336])
def test_a_rank_whose_parts_outweigh_the_reads_is_too_wide(N):
    def bytes_of_parts(rank: int) -> int:  # of many rows
        M = 1 << 20
        return Split.of(M, N, rank, 132, scaled=True).traffic(M, N, rank) // M

    saved = 2 * N * 2
    for rank in (1, 8, 16, 32, 48):
        assert gradients.too_wide(N, rank, torch.bfloat16) is None
        assert bytes_of_parts(rank) < 0.8 * saved
    expected = f"rank 64: parts of its gradients would take {N * 4:,} bytes a row to save {N * 4:,}"
    assert gradients.too_wide(N, 64, torch.bfloat16) == expected
    assert bytes_of_parts(64) >= saved


def test_when_the_multiplication_stays_an_operator_of_its_own():
    def why(dtype=torch.bfloat16, scale=torch.bfloat16, rank=8, rows=600, start=0):
        y, h, B, d = (
            torch.empty(s, dtype=t)
            for s, t in (((3, 600), dtype), ((3, rank), dtype), ((rows, rank), dtype), ((600,), scale))
        )
        return scaled.apart(y, h, B, d, start)

    assert why() is None
    assert why(dtype=torch.float16) == "outputs of torch.float16 and a scale of torch.bfloat16, not both of bfloat16"
    assert why(scale=torch.float32) == "outputs of torch.bfloat16 and a scale of torch.float32, not both of bfloat16"
    assert why(rows=100) == why(rows=100, start=500) == "its branch has a part of the outputs"
    assert why(rank=100) == "rank 100, not in 1 ... 64"
    assert "to save 2,400" in why(rank=64)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4096, 4096, 16), (2048, 14336, 32), (4096, 1024, 48), (1, 4096, 8)], ids=str)
def test_on_a_gpu_at_the_sizes_of_models(sizes):
    dy, y, h, B, d = case(sizes, "cuda")
    out = BRANCH(y, h, B, 2.0, d)
    check_branch(out, y, h, B, 2.0, d)
    check_gradients(GRADIENTS(dy, out, h, B, 2.0, d), dy, out, h, B, 2.0, d)
