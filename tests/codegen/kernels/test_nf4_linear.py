"""Products with NF4 weights of few rows: against the decoded weight in float64, every structure, odd sizes."""

import pytest
import torch
import torch.nn.functional as F

from rewrite.codegen import nf4
from rewrite.codegen.kernels import nf4_linear
from rewrite.codegen.storage import Nf4

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half of a unit in the last place


def stored(shape, device, blocksize=32, nested=True, dtype=torch.bfloat16):
    """The stored tensors of a random weight, their layout, and the weight that they decode to, float64."""
    packed = nf4.Nf4Tensors.from_weight(torch.randn(shape, device=device), blocksize, nested)
    scales = [packed.nested.absmax, packed.nested.code, packed.nested.offset] if packed.nested else []
    layout = str(Nf4(shape, dtype, blocksize))
    return [packed.codes, packed.absmax, *scales], layout, packed.dequantize(dtype).double()


def close(found, exact, size, dtype):
    """Within one rounding to the dtype, and those of a float32 sum of so many terms of about 1."""
    torch.testing.assert_close(found.double(), exact, rtol=HALF[dtype], atol=2e-6 * size**0.5)


@pytest.mark.parametrize("M", [0, 1, 3, 17, 64, 130])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_few_rows(M, nested, device):
    stored_, layout, w = stored((72, 160), device, nested=nested)
    x = torch.randn(M, 160, device=device).bfloat16()
    assert nf4_linear.supports_product(x, stored_, layout, None, [], [], [], [], []) is None
    close(nf4_linear.product(x, stored_, layout, None, [], [], [], [], []), x.double() @ w.t(), 160, torch.bfloat16)
    dy = torch.randn(M, 72, device=device).bfloat16()
    assert nf4_linear.supports_input_gradient(dy, stored_, layout) is None
    close(nf4_linear.input_gradient(dy, stored_, layout), dy.double() @ w, 72, torch.bfloat16)


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
@pytest.mark.parametrize("dtype", HALF)
def test_blocks_of_every_size(blocksize, dtype, device):
    shape = (20, max(160, blocksize) // blocksize * blocksize)
    stored_, layout, w = stored(shape, device, blocksize, dtype=dtype)
    x, dy = (torch.randn(2, 3, size, device=device).to(dtype) for size in (shape[1], shape[0]))
    y = nf4_linear.product(x, stored_, layout, None, [], [], [], [], [])
    close(y, x.double() @ w.t(), shape[1], dtype)
    close(nf4_linear.input_gradient(dy, stored_, layout), dy.double() @ w, shape[0], dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_weight_is_decoded_bit_for_bit(splits, device, monkeypatch):
    """Rows of the identity pick out weights, and no sum rounds them."""
    monkeypatch.setattr(nf4_linear, "split", lambda kernel, M, device: (splits, -(-3 // splits)))
    stored_, layout, w = stored((70, 288), device)
    for size, function, expected in ((288, nf4_linear.product, w.t()), (70, nf4_linear.input_gradient, w)):
        rest = (None, [], [], [], [], []) if function is nf4_linear.product else ()
        found = function(torch.eye(size, device=device).bfloat16(), stored_, layout, *rest)
        assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("weight", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_of_another_dtype_is_rounded_to_its_own_first(weight, device):
    stored_, layout, w = stored((40, 96), device, dtype=weight)
    found = nf4_linear.product(torch.eye(96, device=device).bfloat16(), stored_, layout, None, [], [], [], [], [])
    assert torch.equal(found, w.to(weight).bfloat16().t())


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("splits", [1, 2])
def test_branches(bias, splits, device, monkeypatch):
    monkeypatch.setattr(nf4_linear, "split", lambda kernel, M, device: (splits, -(-3 // splits)))
    N, K = 88, 288
    stored_, layout, w = stored((N, K), device)
    whole = torch.randn(2, 5, K + 24, device=device).bfloat16()
    x, h0, h1 = whole[..., :K], whole[..., K : K + 20], whole[..., K + 20 :]  # none of them contiguous
    B0, B1 = torch.randn(N, 20, device=device).bfloat16(), torch.randn(4, 30, device=device).bfloat16().t()
    b = torch.randn(N, device=device).bfloat16() if bias else None
    arguments = (x, stored_, layout, b, [h0, h1], [B0, B1], [0.3, -2.0], [0, 50], [])
    assert nf4_linear.supports_product(*arguments) is None
    exact = F.linear(x.double(), w, None if b is None else b.double()) + 0.3 * h0.double() @ B0.double().t()
    exact += F.pad(-2.0 * h1.double() @ B1.double().t(), (50, N - 80))
    close(nf4_linear.product(*arguments), exact, K, torch.bfloat16)


def test_reasons(device):
    stored_, layout, _ = stored((40, 96), device)
    x = torch.randn(3, 96, device=device).bfloat16()

    def reason(x=x, stored_=stored_, layout=layout, bias=None, h=(), B=()):
        return nf4_linear.supports_product(x, stored_, layout, bias, h, B, [1.0] * len(h), [0] * len(h), [])

    assert reason() is None
    assert reason(layout="dense") == "not an NF4 weight"
    assert "float32 products" in (reason(x=x.float()) or "")
    assert "rows" in (reason(x=x.expand(200, 3, 96)) or "")
    assert "float64" in (reason(stored_=[stored_[0], stored_[1], stored_[2].double(), *stored_[3:]]) or "")
    assert "another dtype" in (reason(bias=torch.zeros(40, device=device)) or "")
    h, B = torch.zeros(3, 200, device=device).bfloat16(), torch.zeros(40, 200, device=device).bfloat16()
    assert "rank 200" in (reason(h=[h], B=[B]) or "")
    ragged, text, _ = stored((40, 80), device)
    assert "whole blocks" in (reason(x=x[:, :80], stored_=ragged, layout=text) or "")


def test_a_sum_is_split_where_tiles_are_few():
    kernel = nf4_linear.EXAMPLES[0]
    cpu = torch.device("cpu")
    splits, chunks = nf4_linear.split(kernel, 1, cpu)
    assert (splits, chunks) == (1, 32)  # 64 tiles are enough for what has four multiprocessors
    small = nf4_linear.Nf4Linear(128, 4096, 64, True, False, torch.bfloat16, torch.bfloat16)
    splits, chunks = nf4_linear.split(small, 1, cpu)
    assert splits == 4
    assert splits * chunks * nf4_linear.CHUNK >= 4096
