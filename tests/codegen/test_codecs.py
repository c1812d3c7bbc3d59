"""Codecs of saved activations: error bounds, what is exact, odd sizes, values that are not finite."""

from __future__ import annotations

import pytest
import torch

from rewrite.codegen.codecs import CODECS, Codec, Fp8, Int8, memory_order

SHAPES = [(4, 512), (3, 130), (2, 5, 7), (2, 3, 1), (9,), (0, 8), (3, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_codec = pytest.mark.parametrize("codec", [Fp8(), Int8(), Fp8(16), Int8(16)], ids=str)


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * 3).to(dtype)


def through(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.dtype)


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_bounded(codec: Codec, dtype: torch.dtype, shape: tuple[int, ...]):
    x = values(shape, dtype)
    y = through(codec, x)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, dtype, True)
    exact, size = x.double(), codec.size(shape[-1])
    for start in range(0, shape[-1], size):
        part = exact[..., start : start + size]
        largest = part.abs().amax(-1, keepdim=True) if part.numel() else part
        # Half a step of e4m3, relative, down to its subnormal numbers; half a step of the whole numbers.
        bound = (part.abs() * 2**-4).clamp_min(0) + largest * 2**-16 if isinstance(codec, Fp8) else largest / 254
        slack = torch.finfo(dtype).eps + (torch.finfo(torch.bfloat16).eps if dtype.itemsize == 2 else 1e-6)
        error = (y.double()[..., start : start + size] - part).abs()
        assert bool((error <= bound * (1 + slack) + part.abs() * slack).all())


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_are_those_of_the_stored_tensors(codec: Codec, dtype: torch.dtype, shape: tuple[int, ...]):
    stored = codec.encode(values(shape, dtype))
    assert sum(t.numel() * t.itemsize for t in stored) == codec.bytes(shape, dtype)
    assert stored[0].shape == shape
    assert stored[0].dtype == codec.code


def test_bits_a_value():
    assert CODECS.keys() == {"fp8", "int8"}
    assert Fp8().bytes((512, 4096), torch.bfloat16) == 512 * (4096 + 32)
    assert Int8().bytes((512, 4096), torch.bfloat16) == 512 * (4096 + 64)
    assert Int8().bytes((512, 4096), torch.float32) == 512 * (4096 + 128)


def test_what_a_codec_represents_comes_back_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[codes.isfinite()]  # all 254 values of e4m3
    for power in (-60, -1, 0, 5, 90):
        x = codes * 2.0**power
        normal = x.abs() >= x.abs().max() * 2.0**-13  # below, e4m3 has fewer bits
        assert torch.equal(through(Fp8(256), x)[normal], x[normal])
    whole = torch.arange(-127.0, 128)
    for scale in (1.0, 0.25, 2.0**40):
        assert torch.equal(through(Int8(255), whole * scale), whole * scale)


@every_codec
def test_groups_of_zeros_and_what_is_not_finite(codec: Codec):
    x = torch.tensor([[0.0, 0, 0, 0], [torch.nan, 1, torch.inf, -2], [1e-40, 0, -0.0, 1e-43], [3e38, 1, -3e38, 0]])
    y = through(codec, x)
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[1].isnan(), torch.tensor([True, False, True, False]))
    assert y[1, 3] == -2  # the largest finite value sets the scale
    assert y[2].isfinite().all()
    assert y[2, 0] > 0
    torch.testing.assert_close(y[3], x[3], rtol=0.04, atol=0.01 * 3e38)


@every_codec
def test_a_group_does_not_see_its_neighbours(codec: Codec):
    x = values((2, 300))
    changed = x.clone()
    changed[:, codec.group :] *= 1e6
    assert torch.equal(through(codec, changed)[:, : codec.group], through(codec, x)[:, : codec.group])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_memory_order(order: tuple[int, ...]):
    x = torch.empty(2, 3, 5).permute(order)
    found = memory_order(x.shape, x.stride())
    assert found is not None
    assert x.permute(found).is_contiguous()
    assert memory_order(x[..., :1].expand_as(x).shape, x[..., :1].expand_as(x).stride()) is None
    assert memory_order((), ()) is None


@pytest.mark.parametrize("codec", [Fp8(32), pytest.param(Int8(32), marks=pytest.mark.slow)], ids=str)
def test_inductor_computes_the_same_codes(codec: Codec):
    """Sizes that groups do not divide: what Inductor made of an earlier way of spreading scales was wrong."""
    for shape in ((7, 40), (3, 96)):
        x = values(shape, torch.bfloat16)
        stored = codec.encode(x)
        found = torch.compile(codec.encode, dynamic=False)(x)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(stored, found, strict=True))
        decoded = torch.compile(lambda *s: codec.decode(s, torch.bfloat16), dynamic=False)(*stored)
        assert torch.equal(decoded, codec.decode(stored, torch.bfloat16))


@every_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators_are_the_codec(codec: Codec, shape: tuple[int, ...]):
    x = values(shape, torch.bfloat16)
    encode = (x, codec.name, codec.group)
    checks = ["test_faketensor", "test_autograd_registration"]  # others compute with float8, which torch cannot
    torch.library.opcheck(torch.ops.rewrite.encode_saved.default, encode, test_utils=checks)
    stored, expected = torch.ops.rewrite.encode_saved(*encode), codec.encode(x)
    assert all(map(torch.equal, (t.double() for t in stored), (t.double() for t in expected)))
    decode = (*stored, codec.name, codec.group, torch.bfloat16)
    torch.library.opcheck(torch.ops.rewrite.decode_saved.default, decode, test_utils=checks)
    assert torch.equal(torch.ops.rewrite.decode_saved(*decode), codec.decode(expected, torch.bfloat16))
