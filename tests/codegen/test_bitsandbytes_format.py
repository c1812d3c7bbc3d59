"""The NF4 checkpoint keys of bitsandbytes: exact both ways, and damaged ones are refused by name."""

import doctest
import json
import math

import pytest
import torch

from rewrite.codegen import bitsandbytes_format, nf4
from rewrite.errors import RewriteError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((6, 64), (33, 65), (40, 70), (300, 96), (3, 5, 7))
NAME = "model.layers.3.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def weight(shape, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def as_bytes(fields) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def fields_of(state) -> dict:
    return json.loads(bytes(state[STATE].tolist()))


def flat(tensors: nf4.Nf4Tensors) -> list[torch.Tensor]:
    nested = tensors.nested
    return [tensors.codes, tensors.absmax] + ([nested.absmax, nested.code, nested.offset] if nested else [])


def theirs(bnb, values, double_quant, blocksize=64, storage=torch.uint8) -> tuple[dict, torch.Tensor]:
    """The state-dict entries that bitsandbytes makes of a weight, and its dequantised weight."""
    packed, state = bnb.functional.quantize_4bit(
        values, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant, quant_storage=storage
    )
    entries = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {NAME: packed, **entries}, bnb.functional.dequantize_4bit(packed, state)


def test_docstring_examples():
    result = doctest.testmod(bitsandbytes_format)
    assert result.attempted > 0
    assert result.failed == 0


def test_names_are_the_four_bit_weights():
    keys = ["a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "a.weight", "a.bias", "norm.weight"]
    keys += ["b.weight", "b.weight.quant_state.bitsandbytes__fp4"]
    assert bitsandbytes_format.names(keys) == ["a.weight", "b.weight"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_written_weight_reads_back(shape, dtype, double_quant):
    packed = nf4.Nf4Tensors.from_weight(weight(shape, dtype), double_quant=double_quant)
    again = bitsandbytes_format.read(bitsandbytes_format.write(packed, NAME), NAME)
    assert (again.shape, again.dtype, again.blocksize) == (shape, dtype, 64)
    assert (again.nested is not None) == double_quant
    assert all(map(torch.equal, flat(again), flat(packed)))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtype_is_only_a_view(storage):
    packed = nf4.Nf4Tensors.from_weight(weight((6, 64)))
    state = bitsandbytes_format.write(packed, NAME, storage)
    assert state[NAME].dtype == storage
    assert state[NAME].shape == (192 // storage.itemsize, 1)
    assert torch.equal(bitsandbytes_format.read(state, NAME).codes, packed.codes)


def test_written_tensors_share_no_memory():
    packed = nf4.Nf4Tensors.from_weight(weight((6, 64)), double_quant=True)
    first, second = (bitsandbytes_format.write(packed, name) for name in ("a", "b"))
    assert packed.nested is not None
    books = [first["a.nested_quant_map"], second["b.nested_quant_map"], packed.nested.code]
    assert len({book.data_ptr() for book in books}) == 3


def test_what_bitsandbytes_does_not_store_is_not_written():
    packed = nf4.Nf4Tensors.from_weight(weight((3, 65)))
    with pytest.raises(RewriteError, match=r"98 bytes .* torch.float32.*storage=torch.uint8"):
        bitsandbytes_format.write(packed, NAME, torch.float32)
    with pytest.raises(RewriteError, match="float64"):
        bitsandbytes_format.write(nf4.Nf4Tensors.from_weight(weight((3, 65), torch.float64)), NAME)


def test_meta_tensors_are_read_for_their_shapes():
    packed = nf4.Nf4Tensors.from_weight(weight((6, 64)), double_quant=True)
    state = bitsandbytes_format.write(packed, NAME)
    on_meta = {key: value if key == STATE else value.to("meta") for key, value in state.items()}
    assert bitsandbytes_format.read(on_meta, NAME).dequantize().shape == (6, 64)


# --- damaged checkpoints ---


def drop(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def put(key, make):
    return lambda state: {**state, key: make(state[key])}


def field(name, value):
    return lambda state: {**state, STATE: as_bytes({**fields_of(state), name: value})}


def reorder(code):
    return torch.cat([code[8:], code[:8]])


DAMAGE = [
    (drop(NAME), rf"^{NAME}: is missing; .*shards"),
    (drop(f"{NAME}.absmax"), r"\.absmax: is missing"),
    (drop(f"{NAME}.quant_map"), r"\.quant_map: is missing"),
    (drop(f"{NAME}.nested_absmax"), r"\.nested_absmax: is missing"),
    (drop(f"{NAME}.nested_quant_map"), r"\.nested_quant_map: is missing"),
    (drop(STATE), r"bitsandbytes__nf4: is missing"),
    (put(NAME, lambda t: t[:-1]), rf"^{NAME}: holds 959 bytes, .*\[30, 64\] has 960"),
    (put(NAME, lambda t: t.int()), rf"^{NAME}: is torch.int32"),
    (put(NAME, lambda t: t.bfloat16()), rf"^{NAME}: holds 1920 bytes"),
    (
        put(f"{NAME}.absmax", lambda t: t[:-1]),
        r"\.absmax: is torch.uint8 \[29\], expected torch.uint8 \[30\]",
    ),
    (put(f"{NAME}.absmax", lambda t: t.float()), r"\.absmax: is torch.float32"),
    (put(f"{NAME}.absmax", lambda t: t.bfloat16()), r"\.absmax: is torch.bfloat16 .*CPU in eval mode"),
    (put(f"{NAME}.nested_absmax", lambda t: t.repeat(2)), r"\.nested_absmax: .*\[2\], expected .*\[1\]"),
    (put(f"{NAME}.nested_absmax", lambda t: t * math.inf), r"\.nested_absmax: holds inf or nan"),
    (
        put(f"{NAME}.nested_quant_map", lambda t: t[:255]),
        r"\.nested_quant_map: .*\[255\], expected .*\[256\]",
    ),
    (put(f"{NAME}.nested_quant_map", lambda t: t.half()), r"\.nested_quant_map: is torch.float16"),
    (put(f"{NAME}.quant_map", reorder), r"\.quant_map: entry 0 is 0\.0795.*NF4 code has -1\.0"),
    (put(f"{NAME}.quant_map", lambda t: t * 1.0001), r"\.quant_map: entry 0"),
    (put(f"{NAME}.quant_map", lambda t: t[1:]), r"\.quant_map: .*\[15\], expected .*\[16\]"),
    (put(STATE, lambda t: t[:-5]), r"bitsandbytes__nf4: is not JSON"),
    (put(STATE, lambda t: torch.full_like(t, 255)), r"bitsandbytes__nf4: is not JSON"),
    (put(STATE, lambda t: t.float()), r"bitsandbytes__nf4: is torch.float32"),
    (put(STATE, lambda t: as_bytes([1, 2])), r"bitsandbytes__nf4: is not a JSON object"),
    (field("quant_type", "fp4"), r"bitsandbytes__nf4: quant_type is 'fp4'"),
    (field("blocksize", 48), r"blocksize is 48"),
    (field("blocksize", True), r"blocksize is True"),
    (field("blocksize", 128), r"\.absmax: is torch.uint8 \[30\], expected torch.uint8 \[15\]"),
    (field("dtype", "float64"), r"dtype is 'float64'"),
    (field("dtype", ["float32"]), r"dtype is \['float32'\]"),
    (field("shape", None), r"shape is None"),
    (field("shape", [64, -30]), r"shape is \[64, -30\]"),
    (field("shape", [64, 31]), rf"^{NAME}: holds 960 bytes, .*\[64, 31\] has 992"),
    (field("nested_blocksize", 64), r"nested_blocksize is 64, only 256"),
    (field("nested_dtype", "float16"), r"nested_dtype is 'float16'"),
    (field("nested_offset", math.nan), r"nested_offset is nan"),
    (field("nested_offset", "0.5"), r"nested_offset is '0.5'"),
    (field("nested_offset", None), r"\.nested_absmax: is there, but .* has no nested_offset"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(damage, message):
    state = bitsandbytes_format.write(nf4.Nf4Tensors.from_weight(weight((30, 64)), double_quant=True), NAME)
    bitsandbytes_format.read(state, NAME)
    with pytest.raises(RewriteError, match=message) as caught:
        bitsandbytes_format.read(damage(state), NAME)
    assert str(caught.value).startswith(NAME)
    assert "; " in str(caught.value)


def test_quantised_scales_without_their_header_are_refused():
    state = bitsandbytes_format.write(nf4.Nf4Tensors.from_weight(weight((30, 64)), double_quant=True), NAME)
    fields = {key: value for key, value in fields_of(state).items() if not key.startswith("nested")}
    single = {key: value for key, value in state.items() if "nested" not in key} | {STATE: as_bytes(fields)}
    with pytest.raises(RewriteError, match=r"\.absmax: is torch.uint8 \[30\], expected torch.float32"):
        bitsandbytes_format.read(single, NAME)


def test_fp4_is_refused():
    state = {
        NAME: torch.zeros(32, 1, dtype=torch.uint8),
        f"{NAME}.quant_state.bitsandbytes__fp4": torch.zeros(2),
    }
    with pytest.raises(RewriteError, match="bitsandbytes__fp4: the weight is FP4"):
        bitsandbytes_format.read(state, NAME)


# --- bitsandbytes ---


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_their_weight_is_read_exactly_and_written_back(bnb, shape, dtype, blocksize, double_quant):
    state, expected = theirs(bnb, weight(shape, dtype), double_quant, blocksize)
    packed = bitsandbytes_format.read(state, NAME)
    assert (packed.shape, packed.dtype, packed.blocksize) == (shape, dtype, blocksize)
    assert torch.equal(bits(packed.dequantize()), bits(expected))
    again = bitsandbytes_format.write(packed, NAME)
    assert again.keys() == state.keys()
    assert fields_of(again) == fields_of(state)
    assert all(torch.equal(bits(again[key]), bits(state[key])) for key in state if key != STATE)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_their_storage_dtypes_are_read_exactly(bnb, storage):
    state, expected = theirs(bnb, weight((40, 96), torch.bfloat16), True, storage=storage)
    assert state[NAME].dtype == storage
    packed = bitsandbytes_format.read(state, NAME)
    assert torch.equal(bits(packed.dequantize()), bits(expected))
    assert torch.equal(bits(bitsandbytes_format.write(packed, NAME, storage)[NAME]), bits(state[NAME]))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 64), (33, 65), (300, 96)])
def test_they_read_ours_exactly(bnb, shape, dtype, double_quant):
    packed = nf4.Nf4Tensors.from_weight(weight(shape, dtype), double_quant=double_quant)
    state = bitsandbytes_format.write(packed, NAME)
    stats = {key.removeprefix(f"{NAME}."): value for key, value in state.items() if key != NAME}
    read = bnb.functional.QuantState.from_dict(dict(stats), torch.device("cpu"))
    assert torch.equal(bits(bnb.functional.dequantize_4bit(state[NAME], read)), bits(packed.dequantize()))
    param = bnb.nn.Params4bit.from_prequantized(state[NAME], dict(stats), device="cpu")
    assert (param.quant_type, param.blocksize, param.compress_statistics) == ("nf4", 64, double_quant)
    assert torch.equal(bits(bnb.functional.dequantize_4bit(param.data, param.quant_state)), bits(packed.dequantize()))


def linear4bit(bnb, double_quant):
    layer = bnb.nn.Linear4bit(128, 96, bias=True, quant_type="nf4", compress_statistics=double_quant)
    layer.load_state_dict({"weight": weight((96, 128)), "bias": weight((96,))})
    return layer.to("cpu")


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_of_a_live_layer_through_a_file(bnb, tmp_path, double_quant):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = linear4bit(bnb, double_quant)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    live = bitsandbytes_format.read(layer.state_dict(), "weight")
    assert type(live.codes) is torch.Tensor
    assert torch.equal(bits(live.dequantize()), bits(expected))
    safetensors.save_file(layer.state_dict(), tmp_path / "theirs.safetensors")
    filed = safetensors.load_file(tmp_path / "theirs.safetensors")
    assert bitsandbytes_format.names(filed) == ["weight"]
    packed = bitsandbytes_format.read(filed, "weight")
    assert torch.equal(bits(packed.dequantize()), bits(expected))
    safetensors.save_file(bitsandbytes_format.write(packed, "weight"), tmp_path / "ours.safetensors")
    ours = safetensors.load_file(tmp_path / "ours.safetensors")
    stats = {key.removeprefix("weight."): value for key, value in ours.items() if key != "weight"}
    read = bnb.functional.QuantState.from_dict(stats, torch.device("cpu"))
    assert torch.equal(bits(bnb.functional.dequantize_4bit(ours["weight"], read)), bits(expected))


def test_scales_that_their_cpu_layout_has_rounded_are_refused(bnb):
    layer = linear4bit(bnb, double_quant=False)
    repacked, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = repacked, state  # what its forward does in eval mode
    with pytest.raises(RewriteError, match=r"weight\.absmax: is torch.bfloat16 \[2, 96\].*CPU in eval mode"):
        bitsandbytes_format.read(layer.state_dict(), "weight")
