"""NF4: four-bit NormalFloat weights with one scale per block, and the double quantisation of those scales.

Plain PyTorch on any device, bit for bit the arithmetic of bitsandbytes.  This module knows the numbers only:
checkpoint keys are in `bitsandbytes_format`, kernels are elsewhere.  Source of the data type: Dettmers et al.
2023 (QLoRA, arXiv 2305.14314); of the 8-bit map of the scales: Dettmers et al. 2021 (arXiv 2110.02861).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.codegen.tensors import is_eager
from rewrite.errors import RewriteError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # scales that share one second-level scale

# The float32 values of the sixteen codes: quantiles of the normal distribution scaled to [-1, 1], zero exact.
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


# A value above THRESHOLDS[i] gets at least code i + 1; a value equal to it stays below.
THRESHOLDS = tuple(_float32((low + high) / 2) for low, high in itertools.pairwise(CODE))

_PAIRS = [(high, low) for high in CODE for low in CODE]  # what each byte stands for, high nibble first
_SMALLEST = 1e-38  # the divisor of an all-zero block
_CHUNK = 1 << 20  # elements that are converted at a time: a few MB of temporaries, a multiple of every block size
_TABLES: dict[torch.device, Tensor] = {}


def quantize(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Round each block of `blocksize` consecutive elements to sixteen levels within its largest magnitude.

    >>> codes, absmax = quantize(torch.tensor([[0.5, -2.0, 0.0]]))
    >>> [f"{byte:02x}" for byte in codes.flatten().tolist()], absmax.tolist()
    (['a0', '77'], [2.0])

    Args:
        weight: any shape, any floating dtype (float64 is rounded to float32 first), contiguous or not;
            elements are taken in row-major order.
        blocksize: a power of two, 32 to 4096.

    Returns:
        codes: uint8 [ceil(n / 2), 1]; byte i holds element 2i in its high and 2i + 1 in its low nibble
            (code 7, zero, pads an odd n).
        absmax: float32 [ceil(n / blocksize)].

    Equal bit for bit to `bitsandbytes.functional.quantize_4bit(quant_type="nf4")` of its PyTorch backend, its
    treatment of a short last block included: that one is divided by its absmax where whole blocks are
    multiplied by the reciprocal, and its absmax is never below 1e-38.

    Raises:
        RewriteError: the weight is not floating point, or holds inf or nan (not looked for in fake and meta
            tensors); the block size is not one of the above.
    """
    _check_blocksize(blocksize)
    if not weight.dtype.is_floating_point:
        raise RewriteError(f"NF4 stores floating-point weights, this one is {weight.dtype}; leave it as it is")
    flat = weight.detach().reshape(-1)
    numel, device = flat.numel(), flat.device
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=device)
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.float32, device=device)
    chunk = _CHUNK if _holds_data(flat) else max(numel, 1)  # shapes alone take no memory
    for start in range(0, numel, chunk):
        stop = min(start + chunk, numel)
        scaled, absmax_chunk = _scale_blocks(flat[start:stop].float(), blocksize)
        nibbles = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
        absmax[start // blocksize : -(-stop // blocksize)] = absmax_chunk
        codes[start // 2 : (stop + 1) // 2] = _pack(nibbles)
    if _holds_data(absmax) and not bool(torch.isfinite(absmax).all()):
        raise RewriteError("NF4 cannot store a weight that holds inf or nan; repair the weight, or exclude it")
    return codes.unsqueeze(1), absmax


def _scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float32 [n] -> the same over the absmax of their blocks, and those absmax."""
    whole = values.numel() // blocksize * blocksize
    blocks = values[:whole].reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).reshape(-1)
    if whole == values.numel():
        return scaled, absmax
    last = values[whole:].abs().amax().clamp(min=_SMALLEST)
    return torch.cat([scaled, values[whole:] / last]), torch.cat([absmax, last.unsqueeze(0)])


def _pack(nibbles: Tensor) -> Tensor:
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_full((1,), CODE.index(0.0))])
    return (nibbles[::2] << 4) | nibbles[1::2]


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
) -> Tensor:
    """The weight that `quantize` stored: CODE[code] x its block's absmax in float32, rounded once to `dtype`.

    >>> w = torch.tensor([[0.5, -2.0, 0.0]])
    >>> dequantize(*quantize(w), w.shape, torch.float32).tolist()
    [[0.4922246038913727, -2.0, 0.0]]

    Args:
        codes: uint8, ceil(n / 2) bytes in any shape.
        absmax: float32 [ceil(n / blocksize)]; float64 is taken too (a model that was cast with `.double()`).
        shape: of the result, n elements.
        dtype: any floating dtype; float64 is the float32 product, widened.

    Equal bit for bit to `bitsandbytes.functional.dequantize_4bit` of its PyTorch backend.  Can be traced (Dynamo,
    AOTAutograd, fake and meta tensors): no tensor constants, no data-dependent control flow.

    Raises:
        RewriteError: a size or dtype does not fit; a half-precision `absmax` has lost bits and is refused.
    """
    numel = math.prod(shape)
    check_stored(codes, absmax, (), numel, blocksize)
    codes, absmax = codes.reshape(-1), absmax.to(torch.float32)
    table = _pair_table(codes)
    if not (is_eager(codes) and codes.device.type == "cpu"):
        return _decode(codes, absmax, table, numel, blocksize).to(dtype).reshape(tuple(shape))
    # A CPU spends its time on fresh memory: pieces that stay in the cache are faster than whole weights.
    out = torch.empty(numel, dtype=dtype, device=codes.device)
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        bytes_ = codes[start // 2 : (stop + 1) // 2]
        scales = absmax[start // blocksize : -(-stop // blocksize)]
        out[start:stop] = _decode(bytes_, scales, table, stop - start, blocksize)
    return out.reshape(tuple(shape))


def _decode(codes: Tensor, absmax: Tensor, table: Tensor, numel: int, blocksize: int) -> Tensor:
    """uint8 [ceil(n / 2)], float32 [ceil(n / blocksize)] -> float32 [n]."""
    values = table.index_select(0, codes.int()).reshape(-1)
    whole = numel // blocksize * blocksize
    scaled = values[:whole].reshape(-1, blocksize).mul_(absmax[: whole // blocksize].unsqueeze(1)).reshape(-1)
    if whole == numel:
        return scaled
    return torch.cat([scaled, values[whole:numel] * absmax[-1]])


def _pair_table(codes: Tensor) -> Tensor:
    """float32 [256, 2]: the two values of each byte, on the device of `codes`."""
    # On a GPU not kept either: made while CUDA graphs are recorded, it would be memory of theirs.
    if not is_eager(codes) or codes.device.type != "cpu":
        return _traced_pair_table(codes.device)
    table = _TABLES.get(codes.device)
    if table is None:
        table = torch.tensor(_PAIRS, dtype=torch.float32, device=codes.device)
        # Under a dispatch mode this is that mode's tensor and must not outlive it.
        if type(table) is Tensor:
            _TABLES[codes.device] = table
    return table


def _traced_pair_table(device: torch.device) -> Tensor:
    # Made of operators: a tensor constant would have to be lifted by whoever traces and copied to the device.
    index = torch.arange(16, device=device)
    code = torch.full((16,), CODE[0], dtype=torch.float32, device=device)
    for i, value in enumerate(CODE[1:], start=1):
        code = torch.where(index == i, value, code)
    return torch.stack([code.unsqueeze(1).expand(16, 16), code.expand(16, 16)], dim=2).reshape(256, 2)


def _holds_data(tensor: Tensor) -> bool:
    return is_eager(tensor) and tensor.device.type != "meta"


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise RewriteError(f"an NF4 block has {', '.join(map(str, BLOCKSIZES))} elements, not {blocksize}")


def check_stored(codes: Tensor, absmax: Tensor, nested: Sequence[Tensor], numel: int, blocksize: int) -> None:
    """Refuse tensors that are not those of `numel` weights; `nested` are absmax, code and offset of the scales, or ().

    Raises:
        RewriteError: a size or dtype does not fit; half-precision scales have lost bits and are refused.
    """
    _check_blocksize(blocksize)
    if codes.dtype != torch.uint8 or codes.numel() != (numel + 1) // 2:
        raise RewriteError(
            f"{numel} NF4 weights are {(numel + 1) // 2} elements of uint8, these are {codes.numel()} of {codes.dtype}"
        )
    if absmax.numel() != -(-numel // blocksize) or absmax.dim() != 1:
        raise RewriteError(
            f"{numel} NF4 weights in blocks of {blocksize} have absmax [{-(-numel // blocksize)}], "
            f"not {list(absmax.shape)}"
        )
    if nested:
        _check_nested(absmax, *nested)
    else:
        _check_precision(absmax)


def _check_nested(codes: Tensor, nested_absmax: Tensor, nested_code: Tensor, offset: Tensor) -> None:
    count = codes.numel()
    if codes.dtype != torch.uint8 or nested_absmax.numel() != -(-count // NESTED_BLOCKSIZE):
        raise RewriteError(
            f"{count} scales of uint8 have {-(-count // NESTED_BLOCKSIZE)} second-level scales, "
            f"these are {codes.dtype} and have {nested_absmax.numel()}"
        )
    if nested_code.numel() != 256:
        raise RewriteError(f"the code book of doubly quantised scales has 256 values, not {nested_code.numel()}")
    _check_precision(nested_absmax, nested_code, offset)


def _check_precision(*scales: Tensor) -> None:
    for tensor in scales:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise RewriteError(
                f"NF4 scales are float32, these are {tensor.dtype} and have lost bits; "
                "cast the model before it is quantised, or leave its scales out of the cast"
            )


def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit data type, ascending: float32 [256] on the CPU.

    >>> dynamic_map()[[0, 127, 255]].tolist()
    [-0.992968738079071, 0.0, 1.0]

    Each decade 10^-6 ... 10^0 holds 1, 2, 4, ... 64 equal parts of [0.1, 1], by their centres and with both
    signs; 0 and 1 fill the rest.  Equal bit for bit to `bitsandbytes.functional.create_dynamic_map()`.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32, device="cpu")
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return torch.cat([*positive, *(-part for part in positive), ends]).sort().values


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: the scales less their mean, to the nearest of 256 values in blocks of 256.

    >>> codes, nested_absmax, offset = quantize_absmax(torch.tensor([1.0, 2.0, 3.0]))
    >>> codes.tolist(), nested_absmax.tolist(), offset.item()
    ([0, 127, 255], [1.0], 2.0)

    Args:
        absmax: float32 [m].

    Returns:
        codes: uint8 [m], indices into `dynamic_map()`.
        nested_absmax: float32 [ceil(m / 256)].
        offset: float32 scalar.

    The codes are the nearest ones.  Those of bitsandbytes are not reproducible: its CPU backend finds them
    through a lookup table that misses the nearest in about 0.1 % of the entries, and the mean depends on the
    device's order of summation.  So read its checkpoints (`dequantize_absmax` is exact), and do not compare
    requantised ones.

    Raises:
        RewriteError: `absmax` is not float32 or not one-dimensional.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise RewriteError(f"NF4 absmax are a float32 vector, not {absmax.dtype} {list(absmax.shape)}")
    absmax = absmax.detach()
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    padding = -absmax.numel() % NESTED_BLOCKSIZE
    blocks = torch.nn.functional.pad(absmax - offset, (0, padding)).reshape(-1, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = blocks / nested_absmax.clamp(min=_SMALLEST).unsqueeze(1)
    values = dynamic_map().to(absmax.device)
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes.reshape(-1)[: absmax.numel()].clone(), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_code: Tensor, offset: Tensor) -> Tensor:
    """The scales that double quantisation stored: nested_code[code] x nested_absmax of its block, + offset.

    >>> codes, nested_absmax, offset = quantize_absmax(torch.tensor([1.0, 2.0, 3.0]))
    >>> dequantize_absmax(codes, nested_absmax, dynamic_map(), offset).tolist()
    [1.0070312023162842, 2.0, 3.0]

    Args:
        codes: uint8 [m].
        nested_absmax: float32 [ceil(m / 256)].
        nested_code: float32 [256].
        offset: float32 scalar.

    Returns:
        float32 [m].

    Product and sum are rounded one after the other, as bitsandbytes does; a kernel that
    contracts them into one fused multiply-add differs in the last bit.  Can be traced.

    Raises:
        RewriteError: a size does not fit; half-precision scales have lost bits and are refused.
    """
    _check_nested(codes, nested_absmax, nested_code, offset)
    count = codes.numel()
    blocks = nested_absmax.to(torch.float32).repeat_interleave(NESTED_BLOCKSIZE)[:count]
    return nested_code.to(torch.float32).index_select(0, codes.int()) * blocks + offset.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Nested:
    """What reads m doubly quantised scales: float32 absmax [ceil(m / 256)], code [256] and offset []."""

    absmax: Tensor
    code: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Nf4Tensors:
    """One NF4 weight: codes uint8 [ceil(n / 2), 1] and the m = ceil(n / blocksize) scales.

    >>> packed = Nf4Tensors.from_weight(torch.randn(6, 64), double_quant=True)
    >>> packed.absmax.dtype, packed.dequantize().shape
    (torch.uint8, torch.Size([6, 64]))

    `absmax` is float32 [m], or uint8 [m] where `nested` says how to read it.  `shape` and `dtype` are the
    weight's when it was quantised.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    nested: Nested | None = None

    @classmethod
    def from_weight(cls, weight: Tensor, blocksize: int = 64, double_quant: bool = False) -> Nf4Tensors:
        """Quantise `weight`, and its scales too if `double_quant`."""
        codes, absmax = quantize(weight, blocksize)
        nested = None
        if double_quant:
            absmax, nested_absmax, offset = quantize_absmax(absmax)
            nested = Nested(nested_absmax, dynamic_map().to(weight.device), offset)
        return cls(codes, absmax, tuple(weight.shape), weight.dtype, blocksize, nested)

    def scales(self) -> Tensor:
        """The absmax of every block: float32 [m]."""
        if self.nested is None:
            return self.absmax
        return dequantize_absmax(self.absmax, self.nested.absmax, self.nested.code, self.nested.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, in the dtype that it had or in `dtype`."""
        return dequantize(self.codes, self.scales(), self.shape, dtype or self.dtype, self.blocksize)


def bytes_per_weight(blocksize: int = 64, double_quant: bool = False) -> float:
    """Bytes of storage for one weight of a large matrix: half a byte and its share of the block's scale.

    >>> bytes_per_weight(64), bytes_per_weight(64, double_quant=True)
    (0.5625, 0.515869140625)

    Exact where whole blocks fill the weight; the code books (64 bytes and 1 KiB) and the offset are not in.
    """
    scale = 1 + 4 / NESTED_BLOCKSIZE if double_quant else 4.0
    return 0.5 + scale / blocksize
