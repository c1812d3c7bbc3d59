"""A branch and a scale in one pass, and all their gradients in another: the kernels and operators against float64."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen import nf4, scaled
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


def test_reasons():
    def of(M: int, N: int, rank: int, dtype: torch.dtype = torch.bfloat16):
        dy, h, B, out, d = (
            torch.empty(s, dtype=dtype, device="meta") for s in ((M, N), (M, rank), (N, rank), (M, N), (N,))
        )
        return dy, h, B, (out, d)

    assert gradients.supports(*of(8192, 4096, 16)) is None
    assert gradients.supports(*of(8, 4096, 16)) is None  # one launch in place of many
    assert gradients.supports(*of(8192, 4096, 128)) == "rank 128, not in 1 ... 64"
    assert gradients.supports(*of(20000, 130, 64)) is None
    assert gradients.supports(*of(8192, 4096, 16, torch.float32)) == "float32: cuBLAS is faster"
    dy, h, B, (out, d) = of(8192, 4096, 16)
    assert gradients.supports(dy, h, B, (out, d.float())) == "operands of several dtypes"


def test_when_the_multiplication_stays_an_operator_of_its_own():
    from torch._subclasses import FakeTensorMode

    def why(device="cuda", dtype=torch.bfloat16, branches=1, rank=8, rows=6, start=0):
        x, d = torch.empty(3, 5, dtype=dtype, device=device), torch.empty(6, dtype=dtype, device=device)
        h, B = (torch.empty(n, rank, dtype=dtype, device=device) for n in (3, rows))
        return scaled.apart(x, [h] * branches, [B] * branches, [start] * branches, d)

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "unusable", lambda device: None)
        assert why() is None
        assert why("cpu") == "on cpu, a compiler fuses it with what follows"
        assert why(dtype=torch.float16) == "a product of torch.float16 and a scale of torch.float16"
        assert why(branches=2) == why(rows=3).replace("1", "2") == "2 branches, or one of a part of the outputs"
        assert why(rank=200) == "rank 200, more than 128"


@pytest.mark.parametrize("stored", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("shape", [(2, 9, 64), (1, 64), (0, 64)], ids=str)
def test_a_layer(stored, shape, monkeypatch):
    """On either way: `adapted_linear(...) * d` and its gradients."""
    torch.manual_seed(5)
    W = torch.randn(24, 64, dtype=torch.float64)
    weight, layout = [W], "dense"
    if stored:
        weight, layout = list(nf4.quantize(W)), "nf4:float64:64:24x64"
    leaves = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in (shape, (*shape[:-1], 3), (24, 3), (24,))
    ]
    results = []
    for reason in (None, "apart"):
        monkeypatch.setattr(scaled, "apart", lambda *_, reason=reason: reason)
        x, h, B, d = leaves
        out = torch.ops.rewrite.scaled_linear(x, weight, layout, [h], [B], [0.5], [0], d)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4096, 4096, 16), (2048, 14336, 32), (4096, 1024, 64), (1, 4096, 8)], ids=str)
def test_on_a_gpu_at_the_sizes_of_models(sizes):
    dy, y, h, B, d = case(sizes, "cuda")
    out = BRANCH(y, h, B, 2.0, d)
    check_branch(out, y, h, B, 2.0, d)
    check_gradients(GRADIENTS(dy, out, h, B, 2.0, d), dy, out, h, B, 2.0, d)
