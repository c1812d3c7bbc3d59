"""The operators that rules speak of: one name for every spelling in Dynamo's and in exported graphs."""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx
from torch._C import _nn  # type: ignore[attr-defined]  # where Dynamo finds F.linear and F.pad

import rewrite.codegen.cross_entropy
import rewrite.codegen.dropout
import rewrite.codegen.ops
import rewrite.codegen.row_norms
import rewrite.codegen.scaled
import rewrite.codegen.segmented  # noqa: F401  (they define torch.ops.rewrite)
from rewrite.passes.pattern import Op

aten = torch.ops.aten

linear = Op("linear", ("input", "weight", "bias"), F.linear, _nn.linear, aten.linear.default)
addmm = Op("addmm", ("input", "mat1", "mat2"), torch.addmm, aten.addmm.default)
add = Op(
    "add",
    ("input", "other"),
    operator.add,
    operator.iadd,
    torch.add,
    aten.add.Tensor,
    methods=("add", "add_"),
)
sub = Op("sub", ("input", "other"), operator.sub, torch.sub, aten.sub.Tensor, methods=("sub",))
mul = Op("mul", ("input", "other"), operator.mul, torch.mul, aten.mul.Tensor, methods=("mul",))
pad = Op("pad", ("input", "pad", "mode", "value"), F.pad, _nn.pad, aten.pad.default)
transpose = Op("t", ("input",), torch.t, aten.t.default, methods=("t",))
decode = Op("decode", ("stored", "layout"), torch.ops.rewrite.decode, torch.ops.rewrite.decode.default)
clone = Op("clone", ("input", "memory_format"), torch.clone, aten.clone.default, methods=("clone",))
to = Op("to", ("input", "dtype"), methods=("to",))
cat = Op("cat", ("tensors", "dim"), torch.cat, torch.concat, aten.cat.default)
narrow = Op("narrow", ("input", "dim", "start", "length"), torch.narrow, aten.narrow.default, methods=("narrow",))
dropout = Op("dropout", ("x", "seed", "p"), torch.ops.rewrite.dropout, torch.ops.rewrite.dropout.default)
low_rank_weight = Op(
    "low_rank_weight",
    ("W", "A", "B", "scale", "transposed"),
    torch.ops.rewrite.low_rank_weight,
    torch.ops.rewrite.low_rank_weight.default,
)
attention = Op(
    "multi_head_attention_forward",
    tuple(inspect.signature(F.multi_head_attention_forward).parameters),
    F.multi_head_attention_forward,
)
adapted_linear = Op(
    "adapted_linear",
    ("x", "weight", "layout", "bias", "h", "B", "scale", "start", "skip"),
    torch.ops.rewrite.adapted_linear,
    torch.ops.rewrite.adapted_linear.default,
)
adapted_row_norms = Op(
    "adapted_row_norms",
    ("weight", "layout", "A", "B", "scale"),
    torch.ops.rewrite.adapted_row_norms,
    torch.ops.rewrite.adapted_row_norms.default,
)
segmented_shrink = Op(
    "segmented_shrink",
    ("x", "A", "gate"),
    torch.ops.rewrite.segmented_shrink,
    torch.ops.rewrite.segmented_shrink.default,
)
split = Op("split", ("input", "sizes", "dim"), torch.split, methods=("split",))


def inserted(node: fx.Node) -> bool:
    """Whether a node belongs to an adapter's branch: `insert` made it, or `factor` did from an adapted weight."""
    made_by = str(node.meta.get("rule", ""))
    return made_by == "insert" or made_by.startswith("factor_") or made_by == "linear_padded"
