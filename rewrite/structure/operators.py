"""What ATen operators are to the resolver: products, views, activation functions.  Names, not overloads."""

from __future__ import annotations

from torch import fx

CONTRACTION = {
    **{"mm": 0, "bmm": 0, "matmul": 0, "addmm": 1, "baddbmm": 1, "linear": 0, "mv": 0, "dot": 0},
    **{"convolution": 0, "_convolution": 0, "conv1d": 0, "conv2d": 0, "conv3d": 0, "embedding": 0},
    **{"conv_transpose1d": 0, "conv_transpose2d": 0, "conv_transpose3d": 0},
    **{"_grouped_mm": 0, "grouped_mm": 0, "grouped_mm_fallback": 0},
}
"""Products, by the position of their first factor."""

TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
CONVOLUTION = {"convolution", "_convolution", "conv1d", "conv2d", "conv3d", *TRANSPOSED}
LOOKUP = {"embedding"}
ATTENTION = {
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
}
"""Operators whose first three arguments are query, key and value."""

SOFTMAX = {"_softmax", "softmax", "_safe_softmax"}
ADD = {"add", "add_", "sub", "sub_"}
MULTIPLY = {"mul", "mul_"}
CAST = {"_to_copy", "to", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "dropout", "native_dropout"}
VIEW = {
    *CAST,
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "unsqueeze", "squeeze", "flatten", "unflatten"),
}
PART = {"select", "slice", "split", "split_with_sizes", "chunk", "unbind", "getitem", "narrow", "index", "index_select"}
WEIGHT_STEP = {
    *VIEW,
    *PART,
    "div_",
    "mul_",
    "t",
    "transpose",
    "permute",
    "numpy_T",
    "mT",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
}
"""Steps from a parameter to the operand of a product that leave it the same weight."""

BLANK = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"),
    *("rand_like", "randn_like", "new_empty_strided"),
}
"""What takes the shape of a tensor and nothing else of it."""

ACTIVATION = {
    *("gelu", "silu", "relu", "tanh", "sigmoid", "elu", "celu", "selu", "leaky_relu", "hardswish", "hardsigmoid"),
    *("hardtanh", "mish", "softplus", "erf", "exp", "expm1", "log_sigmoid", "log_sigmoid_forward", "_prelu_kernel"),
    *("prelu", "rrelu", "relu6", "threshold", "glu", "silu_", "relu_", "gelu_", "sigmoid_", "tanh_", "hardswish_"),
    *("hardtanh_", "leaky_relu_", "elu_", "where", "maximum", "sin", "cos", "log1p"),
}
SELECTION = {"topk", "argmax", "sort", "argsort"}
"""How a router chooses."""


def name_of(node: fx.Node) -> str:
    """`aten.add.Tensor` -> `add`; '' for what is no operator."""
    if node.op != "call_function":
        return ""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return (packet.__name__ if packet is not None else getattr(target, "__name__", str(target))).rpartition(".")[2]
