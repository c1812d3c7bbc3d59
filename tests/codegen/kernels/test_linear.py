"""Adapted layers in one pass: the kernel and its route against float64, on odd sizes, branches and layouts."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen import ops  # noqa: F401  (defines the operators)
from rewrite.codegen.kernels import linear, tune
from rewrite.codegen.kernels.products import SumOfProducts, Term
from rewrite.codegen.kernels.target import SM80, SM90
from tests.codegen.kernels.bounds import assert_rounded

Tensor = torch.Tensor
K, N = 136, 72
BRANCHES = {
    "whole": [(0, N, 3, 2.0)],
    "rank 16": [(0, N, 16, 1.0)],
    "rows": [(8, 40, 5, -0.75)],
    "three": [(0, N, 3, 1.0), (0, 24, 20, 2.0), (31, 41, 1, 0.5)],
}


def case(shape, rows, dtype, device, bias=True, K=K, N=N):
    """Arguments of `adapted_linear_core` for branches of (start, rows, rank, scale)."""

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    h = [random(*shape[:-1], rank) for _, _, rank, _ in rows]
    B = [random(count, rank) for _, count, rank, _ in rows]
    scale, start = [s for *_, s in rows], [at for at, *_ in rows]
    return random(*shape), [random(N, K)], "dense", random(N) if bias else None, h, B, scale, start, []


def exact(x, weight, layout, bias, h, B, scale, start, skip, absolute=False) -> Tensor:
    """In float64; `absolute`: of the absolute values."""
    of = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
    y = of(x) @ of(weight[0]).t() + (0 if bias is None else of(bias))
    for hi, Bi, si, at in zip(h, B, scale, start, strict=True):
        y[..., at : at + Bi.shape[0]] += (abs(si) if absolute else si) * (of(hi) @ of(Bi).t())
    return y


def check(out: Tensor, arguments) -> None:
    terms = arguments[0].shape[-1] + sum(h.shape[-1] for h in arguments[4]) + 1
    assert_rounded(out, exact(*arguments), exact(*arguments, absolute=True), terms)


@pytest.mark.parametrize("rows", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("shape", [(2, 17, K), (1, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_product(rows, shape, bias, device, monkeypatch):
    monkeypatch.setattr(linear, "FULL", 0)
    monkeypatch.setattr(linear, "EFFICIENCY", 1.0)
    arguments = case(shape, rows, torch.bfloat16, device, bias)
    check(linear.product(*arguments), arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, device):
    arguments = case((37, K), BRANCHES["three"], dtype, device)
    total = linear._sum(arguments[0], arguments[1], *arguments[3:-1])
    out = arguments[0].new_empty(37, N)
    total.fused(out)
    check(out, arguments)
    reason = total.kernel().supports()
    assert reason is None or (dtype is torch.float32 and reason == "float32: cuBLAS is faster")


@pytest.mark.parametrize("sizes", [(129, 255), (256, 128), (200, 300)], ids=str)
def test_sizes_that_tiles_divide_and_do_not(sizes, device):
    rows, (inner, outer) = [(0, sizes[1], 8, 0.5)], sizes
    arguments = case((70, inner), rows, torch.bfloat16, device, K=inner, N=outer)
    check(run(arguments), arguments)


def run(arguments) -> Tensor:
    x, weight = arguments[:2]
    out = x.new_empty(*x.shape[:-1], weight[0].shape[0])
    linear._sum(x, weight, *arguments[3:-1]).fused(out.view(-1, out.shape[-1]))
    return out


def test_operands_that_are_not_contiguous(device):
    x, weight, _, bias, h, B, *rest = case((4, 9, K), BRANCHES["three"], torch.bfloat16, device)
    weight = [weight[0].t().contiguous().t()]  # stored the other way round, as GPT-2 does
    stacked = torch.cat([torch.zeros_like(x[..., :1]), *h], -1)
    h = list(stacked[..., 1:].split([t.shape[-1] for t in h], -1))  # q, k and v from one product
    B = [t.t().contiguous().t() for t in B]
    arguments = x.transpose(0, 1), weight, "dense", bias, [t.transpose(0, 1) for t in h], B, *rest
    check(run(arguments), arguments)


def test_input_gradient_of_siblings(device):
    """dx = dq Wq + dk Wk + s dh A: long products after one another, a short one first."""
    dtype = torch.bfloat16
    dq, dk, dh = (torch.randn(33, size, device=device).to(dtype) for size in (N + 64, N * 2, 6))
    Wq, Wk, A = (torch.randn(t.shape[1], K, device=device).to(dtype) for t in (dq, dk, dh))
    a, b = [dq, dk, dh], [Wq, Wk, A]
    total = linear.Sum(a, b, [1.0, 1.0, 1.0], [0, 0, 0])
    assert total.supports() is None
    out, plain = (dq.new_empty(33, K) for _ in range(2))
    total.fused(out)
    total.accumulated(plain)
    sums = [sum(of(x) @ of(w) for x, w in zip(a, b, strict=True)) for of in (Tensor.double, lambda t: t.double().abs())]
    assert_rounded(out, *sums, terms=sum(t.shape[1] for t in a))
    torch.testing.assert_close(out.double(), plain.double(), rtol=0.02, atol=0.3)


def test_scales_are_exact_in_float32(device):
    """The accumulator is multiplied by ratios of scales: what comes before it once, what comes after it not at all."""
    h, B = torch.ones(1, 1, device=device), torch.ones(1, 1, device=device)
    x, W = torch.ones(1, 200, device=device), torch.ones(1, 200, device=device)
    total = linear.Sum([x, h, h, h], [W.t(), B, B, B], [1.0, 0.5, 3.0, -8.0], [0, 0, 0, 0])
    out = torch.empty(1, 1, device=device)
    total.fused(out)
    assert out.item() == 200 + 0.5 + 3 - 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"skip": [1, 4]}, "columns of the weight are left out"),
        ({"layout": "nf4:bfloat16:64:72x136"}, "the weight is stored as nf4:bfloat16:64:72x136"),
        ({"h": [], "B": [], "scale": [], "start": []}, "no branch"),
        ({"scale": [0.0]}, "a product that is zero"),
        ({"bias": torch.zeros(N)}, "operands of several dtypes"),
        ({"x": torch.zeros(0, K, dtype=torch.bfloat16)}, "0 rows of 136 values"),
        ({}, "3 x 72 outputs: too few for tiles of 128 x 128 on every multiprocessor"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "".join(value) or "small",
)
def test_reasons(change, reason, monkeypatch):
    monkeypatch.setattr(tune, "_asked", "too few" not in reason)  # which is asked first, where nothing is timed
    names = ["x", "weight", "layout", "bias", "h", "B", "scale", "start", "skip"]
    arguments = dict(zip(names, case((3, K), BRANCHES["whole"], torch.bfloat16, "cpu"), strict=True)) | change
    assert linear.product(*arguments.values()) == reason


def test_what_is_expected_to_be_faster():
    def of(M: int, K: int, N: int, rank: int = 16) -> linear.Sum:
        sizes = [(M, K), (M, rank), (N, K), (N, rank)]
        x, h, W, B = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
        return linear.Sum([x, h], [W.t(), B.t()], [1.0, 2.0], [0, 0])

    assert of(8192, 1024, 4096).slower() is None  # the input gradient of k and v: the epilogue is half of the product
    assert of(8192, 2048, 2048).slower() is None
    assert "needs 0.96" in str(of(8192, 14336, 4096).slower())
    assert "needs 0.86" in str(of(8192, 4096, 4096).slower())
    assert "too few" in str(of(128, 1024, 4096).slower())


def test_tuning_times_both_ways(device, monkeypatch):
    arguments = case((64, K), BRANCHES["whole"], torch.bfloat16, device)
    monkeypatch.setattr(tune, "_asked", True)
    torch.testing.assert_close(linear.product(*arguments).double(), exact(*arguments), rtol=0.02, atol=0.3)


@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: t.name)
def test_configurations_fit(target):
    terms = (Term(4096, 4096, 1, 4096), Term(128, 128, 1, 128))
    kernel = SumOfProducts(4096, terms, True, torch.bfloat16)
    assert kernel.configs(target)
    assert all(kernel.shared(c) <= target.shared for c in kernel.configs(target))


@pytest.mark.gpu
@pytest.mark.parametrize(("inner", "outer"), [(1024, 4096), (2048, 2048), (4096, 1024)])
def test_on_a_gpu_at_the_sizes_of_models(inner, outer):
    arguments = case((2, 1024, inner), [(0, outer, 16, 2.0)], torch.bfloat16, "cuda", K=inner, N=outer)
    check(run(arguments), arguments)
    check(torch.ops.rewrite.adapted_linear_core(*arguments), arguments)


@pytest.mark.gpu
def test_on_a_gpu_the_operator_takes_the_route(monkeypatch):
    taken = []
    monkeypatch.setattr(linear, "into", lambda out, total: taken.append(total.fused(out)))
    arguments = case((2048, 1024), [(0, 4096, 16, 2.0)], torch.bfloat16, "cuda", K=1024, N=4096)
    check(torch.ops.rewrite.adapted_linear_core(*arguments), arguments)
    assert len(taken) == 1
