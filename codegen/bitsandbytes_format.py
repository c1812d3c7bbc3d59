"""The checkpoint keys of bitsandbytes' NF4 weights, read and written without bitsandbytes.

A weight `P` is the tensors `P`, `P.absmax`, `P.quant_map`, `P.quant_state.bitsandbytes__nf4` (JSON as bytes)
and, doubly quantised, `P.nested_absmax` and `P.nested_quant_map`.  Nothing is converted: what is read
dequantises to the bits that bitsandbytes gives, and the other way round.  This module opens no files, knows
no modules, and refuses FP4 and the 8-bit formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from rewrite.codegen.nf4 import BLOCKSIZES, CODE, NESTED_BLOCKSIZE, Nested, Nf4Tensors
from rewrite.errors import RewriteError

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_RESAVE = "save the checkpoint again, or load the unquantised weight and let rewrite quantise it"


def names(keys: Iterable[str]) -> list[str]:
    """The weights that bitsandbytes stored in four bits, NF4 and FP4 alike, in the order of `keys`.

    >>> names(["q.weight", "q.weight.absmax", "q.weight.quant_state.bitsandbytes__nf4", "norm.weight"])
    ['q.weight']
    """
    return [key.rpartition(_STATE)[0] for key in keys if _STATE in key]


def read(state: Mapping[str, Tensor], name: str) -> Nf4Tensors:
    """The NF4 weight `name` (`"model.layers.0.mlp.up_proj.weight"`) of a state dict; its tensors, not copies.

    >>> weight = torch.linspace(-1, 1, 128).reshape(2, 64)
    >>> state = write(Nf4Tensors.from_weight(weight, double_quant=True), "q.weight")
    >>> read(state, "q.weight").shape
    (2, 64)

    The four-bit codes may be stored under another dtype (`bnb_4bit_quant_storage`); they are looked at as
    bytes, so a checkpoint that was *cast* from one storage dtype to another cannot be told from a right one.

    Raises:
        RewriteError: a tensor is missing, has the wrong length for the shape or the wrong dtype, or holds inf
            or nan; the JSON does not parse; the format is not NF4; the message names the key.
    """
    header = _read_header(state, name)
    numel = math.prod(header.shape)
    codes = _read_codes(state, name, header.shape)
    _check_quant_map(state, f"{name}.quant_map")
    blocks = -(-numel // header.blocksize)
    if header.nested_offset is None:
        absmax, nested = _vector(state, f"{name}.absmax", torch.float32, blocks), None
    else:
        absmax = _vector(state, f"{name}.absmax", torch.uint8, blocks)
        nested = Nested(
            _vector(state, f"{name}.nested_absmax", torch.float32, -(-blocks // NESTED_BLOCKSIZE)),
            _vector(state, f"{name}.nested_quant_map", torch.float32, 256),
            torch.tensor(header.nested_offset, dtype=torch.float32, device=absmax.device),
        )
    return Nf4Tensors(codes, absmax, header.shape, header.dtype, header.blocksize, nested)


def write(tensors: Nf4Tensors, name: str, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The state-dict entries of an NF4 weight, as bitsandbytes saves them; the inverse of `read`.

    >>> sorted(write(Nf4Tensors.from_weight(torch.ones(2, 64)), "q.weight"))
    ['q.weight', 'q.weight.absmax', 'q.weight.quant_map', 'q.weight.quant_state.bitsandbytes__nf4']

    Args:
        storage: the dtype that the codes are looked at as (bitsandbytes' `quant_storage`).

    Raises:
        RewriteError: the weight's dtype is none that bitsandbytes knows, or the bytes do not fill `storage`.
    """
    dtype = next((word for word, dtype in _DTYPES.items() if dtype == tensors.dtype), None)
    if dtype is None:
        raise RewriteError(
            f"{name}: bitsandbytes stores weights of {', '.join(_DTYPES)}, this one was {tensors.dtype}; "
            "quantise it from one of those"
        )
    if storage not in _STORAGES or tensors.codes.numel() % storage.itemsize:
        raise RewriteError(
            f"{name}: {tensors.codes.numel()} bytes cannot be stored as {storage}; use storage=torch.uint8"
        )
    fields: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": tensors.blocksize,
        "dtype": dtype,
        "shape": list(tensors.shape),
    }
    device = tensors.codes.device
    entries = {
        name: tensors.codes.reshape(-1).view(storage).unsqueeze(1),
        f"{name}.absmax": tensors.absmax,
        f"{name}.quant_map": torch.tensor(CODE, dtype=torch.float32, device=device),
    }
    if tensors.nested is not None:
        fields |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": tensors.nested.offset.item(),
        }
        entries[f"{name}.nested_absmax"] = tensors.nested.absmax
        # safetensors refuses tensors that share memory, and weights may share one code book.
        entries[f"{name}.nested_quant_map"] = tensors.nested.code.clone()
    header = json.dumps(fields).encode()
    entries[f"{name}{_STATE}nf4"] = torch.tensor(list(header), dtype=torch.uint8, device=device)
    return entries


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    nested_offset: float | None  # None: the scales are not quantised


def _read_header(state: Mapping[str, Tensor], name: str) -> _Header:
    key = f"{name}{_STATE}nf4"
    if key not in state and f"{name}{_STATE}fp4" in state:
        _fail(
            f"{name}{_STATE}fp4",
            "the weight is FP4, not NF4",
            "load it with bitsandbytes and dequantise it first",
        )
    fields = _read_json(state, key)
    if fields.get("quant_type") != "nf4":
        _fail(key, f"quant_type is {fields.get('quant_type')!r}, not 'nf4'", "load the weight with bitsandbytes")
    blocksize, dtype, shape = fields.get("blocksize"), fields.get("dtype"), fields.get("shape")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        _fail(key, f"blocksize is {blocksize!r}, not one of {', '.join(map(str, BLOCKSIZES))}", _RESAVE)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _fail(key, f"dtype is {dtype!r}, not one of {', '.join(_DTYPES)}", _RESAVE)
    if not isinstance(shape, list) or not shape or any(type(size) is not int or size < 1 for size in shape):
        _fail(key, f"shape is {shape!r}, not a list of positive sizes", _RESAVE)
    return _Header(tuple(shape), _DTYPES[dtype], blocksize, _read_offset(state, name, key, fields))


def _read_json(state: Mapping[str, Tensor], key: str) -> dict[str, Any]:
    raw = _tensor(state, key)
    if raw.dtype != torch.uint8 or raw.device.type == "meta":
        _fail(key, f"is {raw.dtype} on {raw.device}, not bytes of JSON", _RESAVE)
    try:
        fields = json.loads(bytes(raw.flatten().tolist()))
    except ValueError as error:  # of the decoder (UTF-8) and of the parser
        _fail(key, f"is not JSON ({error})", _RESAVE)
    if not isinstance(fields, dict):
        _fail(key, "is not a JSON object", _RESAVE)
    return fields


def _read_offset(state: Mapping[str, Tensor], name: str, key: str, fields: dict[str, Any]) -> float | None:
    offset = fields.get("nested_offset")
    tensors = [other for other in (f"{name}.nested_absmax", f"{name}.nested_quant_map") if other in state]
    if offset is None and not tensors:
        return None
    if offset is None:
        _fail(tensors[0], f"is there, but {key} has no nested_offset", _RESAVE)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        _fail(key, f"nested_offset is {offset!r}, not a finite number", _RESAVE)
    for field, wanted in (("nested_blocksize", NESTED_BLOCKSIZE), ("nested_dtype", "float32")):
        if fields.get(field) != wanted:
            _fail(key, f"{field} is {fields.get(field)!r}, only {wanted!r} can be read", _RESAVE)
    return float(offset)


def _read_codes(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    codes = _tensor(state, name)
    if codes.dtype not in _STORAGES:
        _fail(name, f"is {codes.dtype}, not one of the storage dtypes {', '.join(map(str, _STORAGES))}", _RESAVE)
    size, wanted = codes.numel() * codes.element_size(), (math.prod(shape) + 1) // 2
    if size != wanted:
        _fail(name, f"holds {size} bytes, an NF4 weight of shape {list(shape)} has {wanted}", _RESAVE)
    return codes.contiguous().reshape(-1).view(torch.uint8).unsqueeze(1)


def _check_quant_map(state: Mapping[str, Tensor], key: str) -> None:
    found = _vector(state, key, torch.float32, len(CODE))
    if found.device.type == "meta":
        return
    for index, (value, wanted) in enumerate(zip(found.tolist(), CODE, strict=True)):
        if value != wanted:
            _fail(key, f"entry {index} is {value}, the NF4 code has {wanted}", _RESAVE)


def _vector(state: Mapping[str, Tensor], key: str, dtype: torch.dtype, length: int) -> Tensor:
    tensor = _tensor(state, key)
    if tensor.dtype != dtype or list(tensor.shape) != [length]:
        todo = _RESAVE
        if tensor.dtype == torch.bfloat16:  # bitsandbytes' CPU layout, which its own state_dict() undoes only in part
            todo = "save from a bitsandbytes model that has not run on the CPU in eval mode, or " + _RESAVE
        _fail(key, f"is {tensor.dtype} {list(tensor.shape)}, expected {dtype} [{length}]", todo)
    if dtype.is_floating_point and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
        _fail(key, "holds inf or nan", _RESAVE)
    return tensor


def _tensor(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        _fail(key, "is missing", f"load all shards of the checkpoint, or {_RESAVE}")
    # bitsandbytes' own parameter class would re-quantise when it is moved.
    return state[key].detach().as_subclass(Tensor)


def _fail(key: str, wrong: str, todo: str) -> NoReturn:
    raise RewriteError(f"{key}: {wrong}; {todo}")
