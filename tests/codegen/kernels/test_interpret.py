"""The repaired interpreter: bfloat16 casts round to nearest even, products are of values."""

import pytest
import torch

from rewrite.codegen.kernels import interpret, template

pytestmark = pytest.mark.skipif(not interpret.active(), reason="kernels are not interpreted here")

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def count(out, stop):
    found = 0
    for _ in range(0, stop, 3):
        found += 1
    tl.store(out, found)


@triton.jit
def total(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)).to(tl.float32) * 2.0).to(tl.bfloat16))
"""


@pytest.fixture(scope="module")
def kernels():
    return template.load("interpreted", SOURCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_to_bfloat16_are_those_of_torch(kernels, dtype):
    x = (torch.randn(1024) * 1000).to(dtype)
    if dtype is torch.float32:
        special = torch.tensor([1.00390625, 1.01171875, float("nan"), float("inf"), -float("inf"), -0.0, 3.4e38, 1e-40])
        x[:8] = special  # two ties, one to each side; an overflow; a subnormal
    out = torch.empty(1024, dtype=torch.bfloat16)
    kernels.cast[(1,)](x, out, 1024)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_casts_from_bfloat16_are_exact(kernels):
    x = torch.randn(1024).bfloat16()
    out = torch.empty(1024)
    kernels.cast[(1,)](x, out, 1024)
    assert torch.equal(out, x.float())


def test_products_are_of_values(kernels):
    a, b = torch.randn(2, 64, 64).bfloat16()
    out = torch.empty(64, 64)
    kernels.dot[(1,)](a, b, out, 64)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_sums_of_bfloat16(kernels):
    x = torch.randn(256).bfloat16()
    out = torch.empty(1, dtype=torch.bfloat16)
    kernels.total[(1,)](x, out, 256)
    torch.testing.assert_close(out.double(), 2 * x.double().sum(0, keepdim=True), rtol=2**-8, atol=0)


def test_a_loop_up_to_an_argument(kernels):
    out = torch.zeros(1, dtype=torch.int32)
    kernels.count[(1,)](out, 7)
    assert out.item() == 3
