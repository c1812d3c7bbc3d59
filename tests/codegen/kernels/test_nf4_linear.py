"""Products with NF4 weights of few rows: against the decoded weight in float64, every structure, odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from rewrite.codegen import nf4, ops, routes  # noqa: F401  (ops defines the operators)
from rewrite.codegen.kernels import nf4_linear, tune
from rewrite.codegen.kernels.target import SM90
from rewrite.codegen.storage import Nf4

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half of a unit in the last place


def stored(shape, device, blocksize=32, nested=True, dtype=torch.bfloat16):
    """The stored tensors of a random weight, their layout, and the weight that they decode to, float64."""
    packed = nf4.Nf4Tensors.from_weight(torch.randn(shape, device=device), blocksize, nested)
    scales = [packed.nested.absmax, packed.nested.code, packed.nested.offset] if packed.nested else []
    layout = str(Nf4(shape, dtype, blocksize))
    return [packed.codes, packed.absmax, *scales], layout, packed.dequantize(dtype).double()


def close(found, exact, size, dtype):
    """Rounded once to the dtype, and summed in float32 over so many terms of about 1.

    Tensor cores may cut off what they have added after every 16 terms; partial sums are below 4 sqrt(size).
    """
    cut = (size / 16 + 1) * torch.finfo(torch.float32).eps * 4 * size**0.5
    torch.testing.assert_close(found.double(), exact, rtol=HALF[dtype], atol=cut)


@pytest.mark.parametrize("M", [0, 1, 3, 17, 64, 130])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_few_rows(M, nested, device):
    stored_, layout, w = stored((72, 160), device, nested=nested)
    x = torch.randn(M, 160, device=device).bfloat16()
    close(nf4_linear.product(x, stored_, layout, None, [], [], [], [], []), x.double() @ w.t(), 160, torch.bfloat16)
    dy = torch.randn(M, 72, device=device).bfloat16()
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
        pieces = torch.eye(size, device=device).bfloat16().split(nf4_linear.FUSED_ROWS)  # more rows decode W whole
        found = torch.cat([function(rows, stored_, layout, *rest) for rows in pieces])
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
    exact = F.linear(x.double(), w, None if b is None else b.double()) + 0.3 * h0.double() @ B0.double().t()
    exact += F.pad(-2.0 * h1.double() @ B1.double().t(), (50, N - 80))
    close(nf4_linear.product(*arguments), exact, K, torch.bfloat16)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("number", range(4))
def test_every_configuration(number, gradient, device):
    stored_, _, w = stored((200, 224), device)
    kernel = nf4_linear.Nf4Linear(200, 224, 32, True, gradient, torch.bfloat16, torch.bfloat16)
    x = torch.randn(131, kernel.length, device=device).bfloat16()
    y = x.new_full((131, kernel.width), float("nan"))
    kernel.launch(x, *stored_, y, config=kernel.space(SM90)[number], M=131, chunks=2)
    close(y, x.double() @ (w if gradient else w.t()), kernel.length, torch.bfloat16)


def test_reasons(device):
    stored_, layout, _ = stored((40, 96), device)
    x = torch.randn(3, 96, device=device).bfloat16()

    def reason(x=x, stored_=stored_, layout=layout, bias=None, h=(), B=()):
        found = nf4_linear.product(x, stored_, layout, bias, h, B, [1.0] * len(h), [0] * len(h), [])
        return found if isinstance(found, str) else None

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


def test_explain_says_what_computes(monkeypatch):
    monkeypatch.setattr(nf4_linear, "unusable", lambda device: None)
    assert routes.of_storage("nf4", "cuda") == (
        "Triton kernels; products in 16 bits of up to 256 rows decode as they go, "
        "where rows of the weight are made of whole blocks"
    )
    monkeypatch.setattr(nf4_linear, "unusable", lambda device: "Triton is not installed")
    assert routes.of_storage("nf4", "cuda") == "PyTorch operators, no Triton kernels: Triton is not installed"


def test_a_sum_is_split_where_tiles_are_few(monkeypatch):
    def programs(N, K, M):
        kernel = nf4_linear.Nf4Linear(N, K, 64, True, False, torch.bfloat16, torch.bfloat16)
        splits, _ = nf4_linear.split(kernel, M, torch.device("cpu"))
        return splits, splits * math.prod(kernel.grid(kernel.choose(kernel.configs(SM90), M=M), M=M))

    monkeypatch.setattr(nf4_linear, "multiprocessors", lambda device: 132)
    for N, K in ((4096, 4096), (1024, 4096), (4096, 14336)):
        assert all(programs(N, K, M)[1] >= 125 for M in (1, 16, 64))
    assert programs(128256, 4096, 1)[0] == 1  # 2004 tiles
    assert programs(14336, 4096, 256)[0] == 1  # the parts would be larger than the weight


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (4096, 14336), (128256, 8192), (72, 160)], ids=str)
def test_the_parts_of_a_split_sum_take_no_more_than_the_decoded_weight(shape, gradient, monkeypatch):
    monkeypatch.setattr(nf4_linear, "multiprocessors", lambda device: 132)
    kernel = nf4_linear.Nf4Linear(*shape, 32, True, gradient, torch.bfloat16, torch.bfloat16)
    for M in (1, 16, 17, 64, 65, 200, nf4_linear.FUSED_ROWS):
        splits, chunks = nf4_linear.split(kernel, M, torch.device("cpu"))
        assert splits * chunks * nf4_linear.CHUNK >= kernel.length
        assert splits == 1 or splits * M * kernel.width * 4 <= shape[0] * shape[1] * 2


def test_what_is_timed_is_the_faster_of_both_ways(device, monkeypatch):
    """More rows than are fused untimed: where kernels are timed the route has them, and both ways agree."""
    stored_, layout, w = stored((40, 96), device)
    x = torch.randn(nf4_linear.FUSED_ROWS + 1, 96, device=device).bfloat16()
    rest = (None, [], [], [], [], [])
    assert "more than 256 rows" in nf4_linear.product(x, stored_, layout, *rest)
    monkeypatch.setattr(tune, "_asked", True)
    y = nf4_linear.product(x, stored_, layout, *rest)
    close(y, x.double() @ w.t(), 96, torch.bfloat16)
    planned = nf4_linear._product(x, stored_, layout, *rest)
    close(planned.fused(x, stored_, []), x.double() @ w.t(), 96, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 16, 100, 256])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1024, 4096), (4096, 14336), (14336, 4096)])
def test_layers_of_models(M, N, K, device):
    stored_, layout, w = stored((N, K), device, 64)
    x, dy = (torch.randn(M, size, device=device).bfloat16() for size in (K, N))
    h, B = torch.randn(M, 16, device=device).bfloat16(), torch.randn(N, 16, device=device).bfloat16()
    y = torch.ops.rewrite.adapted_linear_core(x, stored_, layout, None, [h], [B], [2.0], [0], [])
    close(y, x.double() @ w.t() + 2.0 * h.double() @ B.double().t(), K, torch.bfloat16)
    close(torch.ops.rewrite.linear_input_gradient(dy, stored_, layout), dy.double() @ w, N, torch.bfloat16)
