"""NF4 arithmetic: golden values from the published code table, equality with bitsandbytes, tracing."""

import doctest
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rewrite.codegen import nf4
from rewrite.errors import RewriteError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3,), (5, 7), (6, 10), (33, 65), (31, 66), (64, 130), (48, 128), (3, 5, 7), (2, 4098))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def weight(shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.fixture
def functional(bnb):
    return bnb.functional


def test_docstring_examples():
    result = doctest.testmod(nf4)
    assert result.attempted > 0
    assert result.failed == 0


# --- golden values: no bitsandbytes needed ---


def test_code_is_float32_and_quantiles_of_the_normal_distribution():
    assert torch.tensor(nf4.CODE, dtype=torch.float32).tolist() == list(nf4.CODE)
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])  # QLoRA, section 3: 8 positive, 7 negative
    lower = -normal.icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    derived = torch.cat([upper, torch.zeros(1), lower]).sort().values
    torch.testing.assert_close(derived / derived.max(), torch.tensor(nf4.CODE), rtol=0, atol=2e-6)


def test_thresholds_are_the_published_ones():
    # dQuantizeNF4 in the bitsandbytes' kernels.cu; some lie half-way between two float32: every digit counts
    negative = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544]
    negative += [-0.23460740596055984, -0.13791173323988914, -0.045525018125772476]
    positive = [0.03979014977812767, 0.1202552504837513, 0.2035212516784668, 0.2920137718319893]
    positive += [0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    published = torch.tensor([*negative, *positive])
    assert list(nf4.THRESHOLDS) == published.tolist()


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_every_code_round_trips(blocksize):
    values = torch.tensor(nf4.CODE) * 3.0
    block = values.repeat(blocksize // 16).expand(3, blocksize)
    codes, absmax = nf4.quantize(block, blocksize)
    expected = [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * (3 * blocksize // 16)
    assert codes.shape == (3 * blocksize // 2, 1)
    assert codes.flatten().tolist() == expected
    assert absmax.tolist() == [3.0, 3.0, 3.0]
    assert torch.equal(nf4.dequantize(codes, absmax, (3, blocksize), torch.float32, blocksize), block)


def test_a_tie_takes_the_lower_code():
    above = torch.tensor(nf4.THRESHOLDS).nextafter(torch.tensor(2.0))
    below = torch.cat([torch.tensor(nf4.THRESHOLDS), torch.ones(17)])
    above = torch.cat([above, torch.ones(17)])
    unpack = [nf4.quantize(values, 32)[0] for values in (below, above)]
    nibbles = [torch.cat([codes >> 4, codes & 15], dim=1).flatten()[:15].tolist() for codes in unpack]
    assert nibbles == [list(range(15)), list(range(1, 16))]


def test_zero_blocks_and_negative_zeros():
    values = torch.zeros(3, 70)
    values[0, :64] = -0.0
    codes, absmax = nf4.quantize(values)
    assert set(codes.flatten().tolist()) == {0x77}
    assert absmax.tolist() == [0.0, 0.0, 0.0, pytest.approx(1e-38)]
    assert not bits(nf4.dequantize(codes, absmax, (3, 70), torch.float32)).any()


def test_odd_number_of_weights_is_padded_with_zero():
    codes, absmax = nf4.quantize(torch.tensor([[1.0, -1.0, 0.5]]))
    assert codes.flatten().tolist() == [0xF0, 0xC7]
    assert nf4.dequantize(codes, absmax, (1, 3), torch.float32).tolist() == [[1.0, -1.0, nf4.CODE[12]]]


def test_blocks_run_over_row_ends_and_scale_alone():
    values = torch.ones(3, 50)
    values[1, 14] = 8.0  # element 64: the second of three blocks
    codes, absmax = nf4.quantize(values)
    assert absmax.tolist() == [1.0, 8.0, 1.0]
    restored = nf4.dequantize(codes, absmax, (3, 50), torch.float32).flatten()
    assert restored[:64].tolist() == [1.0] * 64
    assert restored[65].item() == nf4.CODE[9] * 8
    assert restored[128:].tolist() == [1.0] * 22


def test_work_in_pieces_equals_work_at_once(monkeypatch):
    whole = weight((129, 1031))
    codes, absmax = nf4.quantize(whole)
    restored = nf4.dequantize(codes, absmax, whole.shape, torch.bfloat16)
    monkeypatch.setattr(nf4, "_CHUNK", 4096)
    pieces = nf4.quantize(whole)
    assert torch.equal(pieces[0], codes)
    assert torch.equal(pieces[1], absmax)
    assert torch.equal(nf4.dequantize(codes, absmax, whole.shape, torch.bfloat16), restored)


def test_transposed_weights_are_taken_row_by_row():
    values = weight((24, 40))
    assert all(map(torch.equal, nf4.quantize(values.t()), nf4.quantize(values.t().contiguous())))


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_float32_result_widened(shape):
    values = weight(shape, torch.float64)
    codes, absmax = nf4.quantize(values)
    assert all(map(torch.equal, (codes, absmax), nf4.quantize(values.float())))
    single = nf4.dequantize(codes, absmax, shape, torch.float32)
    assert torch.equal(nf4.dequantize(codes, absmax, shape, torch.float64), single.double())
    assert torch.equal(nf4.dequantize(codes, absmax.double(), shape, torch.float64), single.double())


def test_error_is_at_most_half_the_widest_gap():
    values = weight((40, 96))
    codes, absmax = nf4.quantize(values, 32)
    error = (nf4.dequantize(codes, absmax, values.shape, torch.float32, 32) - values).abs().reshape(-1, 32)
    assert (error.amax(dim=1) <= absmax * (1 - 0.6961928) / 2 * (1 + 1e-6)).all()
    assert error.mean() > 0.01


@pytest.mark.parametrize("shape", [(9, 65), (64, 128), (300, 64)])
def test_double_quantised_scales_are_the_nearest(shape):
    absmax = nf4.quantize(weight(shape))[1]
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    assert offset == absmax.mean()
    assert nested_absmax.shape == (math.ceil(absmax.numel() / 256),)
    restored = nf4.dequantize_absmax(codes, nested_absmax, nf4.dynamic_map(), offset)
    scaled = (absmax - offset).double() / nested_absmax.double().repeat_interleave(256)[: absmax.numel()]
    distance = (scaled.unsqueeze(1) - nf4.dynamic_map().double()).abs()
    chosen = distance.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    assert (chosen <= distance.amin(dim=1) + 1e-7).all()
    assert (restored - absmax).abs().max() <= nested_absmax.max() * 0.0071  # half a step of the last decade


def test_double_quantisation_of_equal_scales_is_exact():
    absmax = torch.full((300,), 0.75)
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    assert nested_absmax.tolist() == [0.0, 0.0]
    assert torch.equal(nf4.dequantize_absmax(codes, nested_absmax, nf4.dynamic_map(), offset), absmax)


def test_dynamic_map_is_sorted_with_both_signs():
    values = nf4.dynamic_map()
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert values[127] == 0
    assert values[255] == 1
    assert torch.equal(values[:127], -values[128:255].flip(0))
    assert values[128].item() == pytest.approx(0.55e-6)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_bytes_per_weight_counts_the_tensors(blocksize, double_quant):
    packed = nf4.Nf4Tensors.from_weight(torch.ones(512, 1024), blocksize, double_quant)
    stored = packed.codes.nbytes + packed.absmax.nbytes + (packed.nested.absmax.nbytes if packed.nested else 0)
    assert stored / (512 * 1024) == nf4.bytes_per_weight(blocksize, double_quant)


def test_packed_weight_dequantises_to_its_dtype():
    values = weight((6, 70), torch.bfloat16)
    packed = nf4.Nf4Tensors.from_weight(values, double_quant=True)
    assert packed.dequantize().dtype == torch.bfloat16
    assert torch.equal(packed.dequantize(), packed.dequantize(torch.float32).bfloat16())
    assert packed.scales().dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "blocksize", "message"),
    [
        (torch.ones(4, 32), 48, "48"),
        (torch.ones(4, 32, dtype=torch.int8), 64, "int8"),
        (torch.tensor([1.0, math.inf]), 64, "inf"),
        (torch.tensor([1.0, math.nan, 2.0] * 64), 64, "nan"),
    ],
)
def test_what_cannot_be_quantised_is_refused(values, blocksize, message):
    with pytest.raises(RewriteError, match=message):
        nf4.quantize(values, blocksize)


def test_what_does_not_fit_is_refused():
    codes, absmax = nf4.quantize(torch.ones(5, 30))
    with pytest.raises(RewriteError, match="75"):
        nf4.dequantize(codes[1:], absmax, (5, 30), torch.float32)
    with pytest.raises(RewriteError, match=r"absmax \[3\]"):
        nf4.dequantize(codes, absmax[1:], (5, 30), torch.float32)
    with pytest.raises(RewriteError, match="lost bits"):
        nf4.dequantize(codes, absmax.bfloat16(), (5, 30), torch.bfloat16)
    small, nested, offset = nf4.quantize_absmax(absmax)
    with pytest.raises(RewriteError, match="second-level"):
        nf4.dequantize_absmax(small, nested.repeat(2), nf4.dynamic_map(), offset)
    with pytest.raises(RewriteError, match="lost bits"):
        nf4.dequantize_absmax(small, nested.half(), nf4.dynamic_map(), offset)
    with pytest.raises(RewriteError, match="256 values"):
        nf4.dequantize_absmax(small, nested, nf4.dynamic_map()[1:], offset)


# --- tracing ---


@pytest.mark.parametrize("shape", [(33, 65), (48, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compiled_dequantize_equals_eager(shape, dtype):
    packed = nf4.Nf4Tensors.from_weight(weight(shape), double_quant=True)
    nested = packed.nested
    assert nested is not None

    def decode(codes, absmax, nested_absmax, nested_code, offset):
        scales = nf4.dequantize_absmax(absmax, nested_absmax, nested_code, offset)
        return nf4.dequantize(codes, scales, shape, dtype)

    stored = packed.codes, packed.absmax, nested.absmax, nested.code, nested.offset
    expected = decode(*stored)
    inlined = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(bits(inlined(*stored)), bits(expected))
    opaque: Any = torch.compiler.allow_in_graph(decode)
    compiled = torch.compile(lambda *tensors: opaque(*tensors), backend="aot_eager", fullgraph=True)
    assert torch.equal(bits(compiled(*stored)), bits(expected))


def test_tracing_under_another_default_dtype_is_exact():
    codes, absmax = nf4.quantize(weight((6, 70)))
    expected = nf4.dequantize(codes, absmax, (6, 70), torch.float32)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        compiled = torch.compile(nf4.dequantize, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(codes, absmax, (6, 70), torch.float32), expected)
        assert torch.equal(nf4.dequantize(codes, absmax, (6, 70), torch.float32), expected)
    finally:
        torch.set_default_dtype(default)


def test_fake_and_meta_weights_get_shapes_without_data():
    with FakeTensorMode():
        fake = nf4.Nf4Tensors.from_weight(torch.empty(33, 65, dtype=torch.bfloat16), double_quant=True)
        assert fake.dequantize().shape == (33, 65)
        assert fake.codes.shape == (1073, 1)
    meta = nf4.Nf4Tensors.from_weight(torch.empty(4096, 14336, device="meta"), double_quant=True)
    assert meta.absmax.shape == (4096 * 14336 // 64,)
    assert meta.dequantize(torch.float16).shape == (4096, 14336)
    real = nf4.Nf4Tensors.from_weight(weight((33, 65)))  # nothing fake may have stayed behind
    assert type(real.dequantize()) is torch.Tensor


def test_a_fake_mode_leaves_no_fake_code_book_behind(monkeypatch):
    monkeypatch.setattr(nf4, "_TABLES", {})
    codes, absmax = nf4.quantize(weight((6, 70)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake: Any = nf4.dequantize(codes, absmax, (6, 70), torch.float32)
        assert fake.fake_mode is mode
    real = nf4.dequantize(codes, absmax, (6, 70), torch.float32)
    assert type(real) is torch.Tensor
    assert real.shape == (6, 70)


def test_first_use_in_inference_mode_leaves_autograd_alone(monkeypatch):
    monkeypatch.setattr(nf4, "_TABLES", {})
    codes, absmax = nf4.quantize(weight((6, 70)))
    with torch.inference_mode():
        expected = nf4.dequantize(codes, absmax, (6, 70), torch.float32)
    x = weight((6, 70)).requires_grad_()
    (gradient,) = torch.autograd.grad((x * nf4.dequantize(codes, absmax, (6, 70), torch.float32)).sum(), x)
    assert torch.equal(gradient, expected)


# --- bitsandbytes ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 512])
def test_equals_bitsandbytes(functional, shape, blocksize, dtype):
    for scale in (1.0, 1e-3, 1e-39, 1e4):
        values = weight(shape, dtype, scale)
        values.flatten()[:1] = -0.0
        theirs, state = functional.quantize_4bit(values, blocksize=blocksize, quant_type="nf4")
        codes, absmax = nf4.quantize(values, blocksize)
        assert torch.equal(codes, theirs)
        assert torch.equal(absmax, state.absmax)
        restored = nf4.dequantize(codes, absmax, shape, dtype, blocksize)
        assert torch.equal(bits(restored), bits(functional.dequantize_4bit(theirs, state)))


def test_equals_bitsandbytes_beside_the_thresholds(functional):
    # Whether a scaled value is a quotient or a product with the reciprocal shows only here.
    thresholds = torch.tensor(nf4.THRESHOLDS)
    for scale in weight((60,)).abs().tolist():
        values = [scale * thresholds]
        values += [values[0].nextafter(torch.tensor(limit)) for limit in (-9.0, 9.0)]
        short = torch.cat([torch.tensor([scale]), *values])
        for block in (short, torch.nn.functional.pad(short, (0, 64 - len(short)))):
            assert torch.equal(nf4.quantize(block)[0], functional.quantize_4bit(block, quant_type="nf4")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_bitsandbytes_at_the_ends_of_the_range(functional, dtype):
    limits = torch.finfo(dtype)
    values = weight((6, 96), dtype).clamp(-1, 1)
    values[0] *= limits.max
    values[1] *= limits.smallest_normal
    values[2] = 0
    values[3] = limits.smallest_normal * 2.0**-3
    theirs, state = functional.quantize_4bit(values, blocksize=32, quant_type="nf4")
    codes, absmax = nf4.quantize(values, 32)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, state.absmax)
    restored = nf4.dequantize(codes, absmax, (6, 96), dtype, 32)
    assert torch.equal(bits(restored), bits(functional.dequantize_4bit(theirs, state)))


def test_every_byte_with_every_kind_of_scale_equals_bitsandbytes(functional):
    codes = torch.arange(256, dtype=torch.uint8).repeat(64).unsqueeze(1)
    absmax = torch.cat([weight((508,)), torch.tensor([0.0, -1.0, 1e-42, 6e4])])
    for dtype in DTYPES:
        state = functional.QuantState(absmax, torch.Size((128, 256)), None, 64, "nf4", dtype)
        theirs = functional.dequantize_4bit(codes, state)
        assert torch.equal(bits(nf4.dequantize(codes, absmax, (128, 256), dtype)), bits(theirs))


def test_dynamic_map_equals_bitsandbytes(functional):
    assert torch.equal(bits(nf4.dynamic_map()), bits(functional.create_dynamic_map()))


@pytest.mark.parametrize("shape", [(9, 65), (128, 96), (300, 64), (512, 70)])
def test_scales_of_bitsandbytes_are_read_exactly(functional, shape):
    values = weight(shape, torch.float16)
    theirs, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    assert state.nested
    scales = nf4.dequantize_absmax(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    expected = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(bits(scales), bits(expected))
    restored = nf4.dequantize(theirs, scales, shape, torch.float16)
    assert torch.equal(bits(restored), bits(functional.dequantize_4bit(theirs, state)))
