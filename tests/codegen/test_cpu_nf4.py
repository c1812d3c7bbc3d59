"""NF4 by the C++ kernels: decoding bit for bit, products against float64."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import rewrite
from rewrite.codegen import direct, nf4, storage
from rewrite.codegen.cpu import build, operators
from rewrite.codegen.cpu import nf4 as cpu_nf4
from rewrite.errors import RewriteError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 5), (5, 7), (6, 10), (33, 65), (31, 66), (64, 130), (48, 128), (3, 4098), (2, 8200))
BUILDS = build.instruction_sets()
# The unit roundoff: what rounding a number to nearest changes of it at most.
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


pytestmark = pytest.mark.skipif(not compiler(), reason="no C++ compiler")


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[build.Build]:
    """Those of one instruction set, with which the operators multiply meanwhile."""
    found = cpu_nf4.kernels(request.param)
    assert found.library() is not None, found.failure
    hand_over(found)
    yield found
    hand_over(cpu_nf4.kernels())


def hand_over(kernels: build.Build) -> None:
    cpu_nf4.hand_over(kernels.library(), operators.kernels().library())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def stored(shape, blocksize=64, double_quant=False, scale=1.0) -> tuple[torch.Tensor, ...]:
    """What a random weight is stored as."""
    generator = torch.Generator().manual_seed(math.prod(shape) + blocksize)
    codes, absmax = nf4.quantize(torch.randn(shape, generator=generator) * scale, blocksize)
    if not double_quant:
        return codes, absmax
    small, nested_absmax, offset = nf4.quantize_absmax(absmax)
    return codes, small, nested_absmax, nf4.dynamic_map(), offset


def reference(parts, shape, dtype, blocksize=64) -> torch.Tensor:
    codes, absmax, *nested = parts
    absmax = nf4.dequantize_absmax(absmax, *nested) if nested else absmax
    return nf4.dequantize(codes, absmax, shape, dtype, blocksize)


def packed(parts, shape, dtype, blocksize=64, kernels=None) -> cpu_nf4.Packed:
    assert cpu_nf4.unreadable(parts, kernels) is None
    return cpu_nf4.Packed(parts, shape, dtype, blocksize, kernels)


class Layer:
    """The operators in C++ with one weight."""

    def __init__(self, parts, shape, dtype, blocksize=64) -> None:
        self.parts, self.layout = list(parts), str(storage.Nf4(shape, dtype, blocksize))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._both("adapted_linear_core", x, self.parts, self.layout, bias, [], [], [], [], [])

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        return self._both("linear_input_gradient", dy, self.parts, self.layout)

    @staticmethod
    def _both(name: str, *args: object) -> torch.Tensor:
        """What the operator returns, and puts into a buffer."""
        operator = getattr(operators.loaded(), name)
        found = operator.default(*args)
        out = torch.full_like(found, math.nan)
        assert operator.out(*args, out=out) is out
        assert torch.equal(bits(out), bits(found))
        return found


# --- decoding ---


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_decodes_bit_for_bit(kernels, shape, dtype, double_quant):
    for blocksize in nf4.BLOCKSIZES:
        parts = stored(shape, blocksize, double_quant)
        found = packed(parts, shape, dtype, blocksize, kernels).decode()
        assert found.dtype == dtype
        assert torch.equal(bits(found), bits(reference(parts, shape, dtype, blocksize))), blocksize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 3e-8, 6e-5, 7e4, 1e38])
def test_decodes_subnormal_and_overflowing_values(kernels, dtype, scale):
    parts = stored((7, 64), scale=scale)
    found = packed(parts, (7, 64), dtype, kernels=kernels).decode()
    assert torch.equal(bits(found), bits(reference(parts, (7, 64), dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_exponent(kernels, dtype):
    absmax = torch.tensor([1.2345 * 2.0**e for e in range(-126, 127)])
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(253, 1).reshape(-1)[: 253 * 16]
    found = packed((codes, absmax), (253, 32), dtype, 32, kernels).decode()
    assert torch.equal(bits(found), bits(nf4.dequantize(codes, absmax, (253, 32), dtype, 32)))


def test_infinite_and_missing_scales_stay_so(kernels):
    codes, _ = stored((3, 64))
    absmax = torch.tensor([math.inf, math.nan, -math.inf])
    for dtype in DTYPES:
        found = packed((codes, absmax), (3, 64), dtype, kernels=kernels).decode()
        torch.testing.assert_close(found, nf4.dequantize(codes, absmax, (3, 64), dtype), equal_nan=True, rtol=0, atol=0)


def test_decodes_views_doubles_and_stacks(kernels):
    shape = (3, 5, 70)
    codes, absmax = stored(shape)
    wide = torch.stack([absmax.double(), absmax.double()], dim=1)[:, 0]
    tall = torch.stack([codes, codes], dim=1)[:, 0]
    found = packed((tall, wide), shape, torch.bfloat16, kernels=kernels).decode()
    assert torch.equal(bits(found), bits(reference((codes, absmax), shape, torch.bfloat16)))


def test_refuses_what_does_not_fit():
    codes, absmax = stored((5, 70))
    with pytest.raises(RewriteError, match="350 NF4 weights are 175 elements"):
        packed((codes[1:], absmax), (5, 70), torch.float32)
    with pytest.raises(RewriteError, match="absmax"):
        packed((codes, absmax[1:]), (5, 70), torch.float32)
    with pytest.raises(RewriteError, match="lost bits"):
        packed((codes, absmax.half()), (5, 70), torch.float32)
    parts = stored((5, 70), double_quant=True)
    with pytest.raises(RewriteError, match="256 values"):
        packed((*parts[:3], parts[3][1:], parts[4]), (5, 70), torch.float32)
    with pytest.raises(RewriteError, match="second-level"):
        packed((*parts[:2], parts[2].repeat(2), *parts[3:]), (5, 70), torch.float32)


# --- products ---


def bound(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|x| |w| times what float32 sums of n terms lose, and one rounding to the result's dtype."""
    exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
    return size * (w.shape[0] + 8) * 2**-24 + exact.abs() * EPS[dtype] * 1.01 + 2**-24


CASES = [((33, 65), 64), ((130, 64), 32), ((65, 1100), 4096), ((70, 34), 32), ((1030, 48), 64), ((5, 1025), 128)]


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 33, 49, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), CASES)
def test_products(kernels, shape, blocksize, dtype, tokens):
    parts = stored(shape, blocksize, double_quant=True)
    layer = Layer(parts, shape, dtype, blocksize)
    w, bias = reference(parts, shape, dtype, blocksize), torch.randn(shape[0]).to(dtype)
    x, dy = torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)
    out = layer.product(x)
    assert ((out.double() - x.double() @ w.double().t()).abs() <= bound(x, w.t(), dtype)).all()
    out = layer.product(x, bias)
    expected = x.double() @ w.double().t() + bias.double()
    assert ((out.double() - expected).abs() <= bound(x, w.t(), dtype) + EPS[dtype] * (expected.abs() + 1)).all()
    dx = layer.input_gradient(dy)
    assert dx.shape == x.shape
    assert ((dx.double() - dy.double() @ w.double()).abs() <= bound(dy, w, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 100])
def test_the_weight_is_rounded_as_it_is_decoded(kernels, dtype, tokens):
    """A product takes the weight in its own dtype, then in that of x: not the numbers before rounding."""
    shape = (40, 96)
    parts = stored(shape)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    w = reference(parts, shape, other).to(dtype)
    layer = Layer(parts, shape, other)
    out = layer.product(3 * torch.eye(tokens, 96).to(dtype))
    assert torch.equal(out[:96], (3 * w.float().t()[:tokens]).to(dtype))
    dx = layer.input_gradient(3 * torch.eye(tokens, 40).to(dtype))
    assert torch.equal(dx[:40], (3 * w.float()[:tokens]).to(dtype))


@pytest.mark.parametrize("tokens", [3, 100])
def test_products_without_16_bit_hardware(kernels, monkeypatch, tokens):
    monkeypatch.setattr(cpu_nf4, "_multiplies", lambda dtype: False)
    hand_over(kernels)
    shape, dtype = (65, 130), torch.bfloat16
    parts = stored(shape)
    w, x = reference(parts, shape, dtype), torch.randn(tokens, 130).to(dtype)
    bias, layer = torch.randn(65).to(dtype), Layer(parts, shape, dtype)
    out = layer.product(x, bias)
    expected = x.double() @ w.double().t() + bias.double()
    assert ((out.double() - expected).abs() <= bound(x, w.t(), dtype) + EPS[dtype] * (expected.abs() + 1)).all()
    dx = layer.input_gradient(out)
    assert ((dx.double() - out.double() @ w.double()).abs() <= bound(out, w, dtype)).all()


def test_products_by_pieces(kernels, monkeypatch):
    monkeypatch.setattr(cpu_nf4, "_PIECE", 32000)
    hand_over(kernels)
    shape = (201, 333)
    parts = stored(shape)
    w, x = reference(parts, shape, torch.float64), torch.randn(50, 333)
    layer = Layer(parts, shape, torch.float32)
    out = layer.product(x)
    assert ((out.double() - x.double() @ w.t()).abs() <= bound(x, w.t(), torch.float32)).all()
    assert ((layer.input_gradient(out).double() - out.double() @ w).abs() <= bound(out, w, torch.float32)).all()
    layer = Layer(parts, shape, torch.float64)
    out = layer.product(x.double())
    torch.testing.assert_close(out, x.double() @ w.t(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.input_gradient(out), out @ w, rtol=1e-13, atol=1e-13)


def test_threads_do_not_share_the_memory_of_pieces(kernels):
    shapes = [(201, 333), (65, 100)]
    layers = [Layer(stored(shape), shape, torch.float64) for shape in shapes]
    decoded = [reference(stored(shape), shape, torch.float64) for shape in shapes]

    def products(i: int) -> bool:
        dy = torch.ones(1, shapes[i][0], dtype=torch.float64)
        return all(torch.allclose(layers[i].input_gradient(dy), dy @ decoded[i]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(products, [0, 1] * 4))


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 5), (torch.bfloat16, 2), (torch.bfloat16, 5)])
def test_few_tokens_are_summed_alike_for_any_number_of_threads(kernels, dtype, tokens):
    shape = (2050, 1100)
    weight, layer = packed(stored(shape), shape, dtype, kernels=kernels), Layer(stored(shape), shape, dtype)
    x, dy = torch.randn(tokens, 1100).to(dtype), torch.randn(tokens, 2050).to(dtype)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append((layer.product(x), layer.input_gradient(dy), weight.decode()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_apart_and_stored_views(kernels):
    """Tensors that the kernels do not read as they lie are copied for the call."""
    shape = (33, 70)
    codes, small, *nested = stored(shape, double_quant=True)
    parts = [torch.stack([t, t], dim=1)[:, 0] for t in (codes, small)]
    parts += [t.double() for t in nested]
    w = reference((codes, small, *nested), shape, torch.float32)
    for tokens in (3, 60):
        x, dy = torch.randn(tokens, 75)[:, 2:72], torch.randn(33, tokens).t()
        layer = Layer(parts, shape, torch.float32)
        assert ((layer.product(x).double() - x.double() @ w.double().t()).abs() <= bound(x, w.t(), x.dtype)).all()
        assert ((layer.input_gradient(dy).double() - dy.double() @ w.double()).abs() <= bound(dy, w, dy.dtype)).all()


# --- the operator ---


def call(layout, parts, x, bias, h, B):
    return torch.ops.rewrite.adapted_linear(
        x, list(parts), str(layout), bias, [h, h[..., :2]], [B, B[:9, :2]], [0.5, 2.0], [0, 3]
    )


@pytest.mark.parametrize("tokens", [(1,), (0,), (2, 3), (2, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_whole_operator_and_its_gradients(monkeypatch, tokens, dtype, double_quant, biased):
    shape = (33, 65)
    layout, parts = storage.Nf4(shape, dtype), stored(shape, double_quant=double_quant)
    x = torch.randn(65, *tokens).to(dtype).movedim(0, -1)  # not contiguous
    h, B, bias = torch.randn(*tokens, 4).to(dtype), torch.randn(33, 4).to(dtype), torch.randn(33).to(dtype)
    leaves = [t.requires_grad_() for t in (x, h, B, *([bias] if biased else []))]
    dy = torch.randn(33, *tokens).to(dtype).movedim(0, -1)
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv(build.SWITCH, switch)
        y = call(layout, parts, x, bias if biased else None, h, B)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    w = reference(parts, shape, dtype).double()
    for found, other in zip(*results, strict=True):
        assert (found.shape, found.dtype, found.stride()) == (other.shape, other.dtype, other.stride())
        size = max(float(w.abs().sum()), 1.0)  # both round the same sums
        torch.testing.assert_close(found, other, rtol=4 * EPS[dtype], atol=8 * EPS[dtype] * math.sqrt(size))


def test_kernels_are_handed_over_to_the_operators():
    """Before generated sources, or a route, get the operators; a weight is not read without."""
    shape = (33, 65)
    layer, dy = Layer(stored(shape), shape, torch.float32), torch.randn(3, 33)
    expected = layer.input_gradient(dy)
    operators.kernels().library().rewrite_take_nf4(None)
    with pytest.raises(RuntimeError, match="were not handed over"):
        operators.loaded().linear_input_gradient(dy, layer.parts, layer.layout)
    operators._hand_over.cache_clear()
    direct.functions.cache_clear()
    into = direct.functions(of_nf4=True)["linear_input_gradient into"]
    found = into(dy, layer.parts, layer.layout, out=torch.empty(3, 65))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [3, 100])
def test_operators_without_kernels(monkeypatch, tokens):
    """A compiler that takes the operators and not the kernels: the reference computes, in compiled graphs too."""
    shape = (33, 65)
    layer, x, dy = Layer(stored(shape), shape, torch.float32), torch.randn(tokens, 65), torch.randn(tokens, 33)
    refusing = build.Build(Path("nf4.cpp"), "portable", failure="no such instructions")
    monkeypatch.setattr(cpu_nf4, "kernels", lambda target=None: refusing)
    w = reference(layer.parts, shape, torch.float32)
    of_layer = layer.parts, layer.layout
    product = torch.ops.rewrite.adapted_linear_core(x, *of_layer, None, [], [], [], [], [])
    torch.testing.assert_close(product, x @ w.t(), rtol=0, atol=0)
    torch.testing.assert_close(torch.ops.rewrite.linear_input_gradient(dy, *of_layer), dy @ w, rtol=0, atol=0)
    direct.functions.cache_clear()
    try:
        table = direct.functions(of_nf4=True)
    finally:
        direct.functions.cache_clear()
    out = table["linear_input_gradient into"](dy, *of_layer, out=torch.empty(tokens, 65))
    torch.testing.assert_close(out, dy @ w, rtol=0, atol=0)


def test_a_weight_of_another_size_is_refused(kernels):
    layer, x, dy = Layer(stored((5, 70)), (5, 71), torch.float32), torch.ones(3, 71), torch.ones(3, 5)
    of_layer = layer.parts, layer.layout
    with pytest.raises(RewriteError, match="355 NF4 weights are 178 elements"):
        torch.ops.rewrite.adapted_linear_core(x, *of_layer, None, [], [], [], [], [])
    with pytest.raises(RewriteError, match="355 NF4 weights are 178 elements"):
        torch.ops.rewrite.linear_input_gradient(dy, *of_layer)
    for call in (lambda: layer.product(x), lambda: layer.input_gradient(dy)):
        with pytest.raises(RuntimeError, match=r"do not store a weight of nf4:float32:64:5x71$"):
            call()
    for layout in ("dense", "nf4:bfloat16:64:5", "nf4:bfloat16:64:5x7x10", "nf4:bfloat16:0:5x70"):
        with pytest.raises(RuntimeError, match=f"not a matrix in NF4: {layout}$"):
            operators.loaded().linear_input_gradient(x, layer.parts, layout)


def test_autocast():
    shape = (33, 65)
    parts, x = stored(shape), torch.randn(3, 65, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.rewrite.adapted_linear(
            x, list(parts), str(storage.Nf4(shape, torch.float32)), None, [], [], [], []
        )
    assert y.dtype == torch.bfloat16
    w, low = reference(parts, shape, torch.bfloat16), x.detach().bfloat16()
    assert ((y.double() - low.double() @ w.double().t()).abs() <= bound(low, w.t(), torch.bfloat16)).all()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx, torch.ones(3, 33) @ w.float(), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    layers = torch.nn.Sequential(torch.nn.Linear(65, 33), torch.nn.GELU(), torch.nn.Linear(33, 7))
    model = rewrite.compile(layers, "lora(r=4)@linear + nf4(linear)", backend=backend)
    x = torch.randn(5, 65)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model.forward(x).square().sum(), trained)
    found = torch.autograd.grad(model(x).square().sum(), trained)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    text = rewrite.explain(model)
    assert "rewrite.adapted_linear" in text
    assert "nf4 on the CPU: C++ kernels" in text


def test_a_traced_decode_has_no_kernel_in_it():
    parts, layout = stored((6, 70)), storage.Nf4((6, 70), torch.bfloat16)
    graph = torch.fx.experimental.proxy_tensor.make_fx(layout.decode, tracing_mode="fake")(*parts)
    assert torch.equal(graph(*parts), layout.decode(*parts))
    assert not any("empty" in str(n.target) for n in graph.graph.nodes)
    compiled = torch.compile(layout.decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*parts), layout.decode(*parts))
    assert layout.decode(*(t.to("meta") for t in parts)).shape == (6, 70)
