"""How Inductor compiles our operators for a CPU: as calls of the functions in `direct.py`, into its buffers, in place.

Importing this loads Inductor, which takes a second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import ir, lowering
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map_only

from rewrite.codegen import direct
from rewrite.codegen.below import BELOW
from rewrite.codegen.cpu import operators


@functools.cache
def install() -> None:
    """Tell Inductor; once a process, before it compiles."""
    for name in direct.PYTHON:
        operator = getattr(torch.ops.rewrite, name).default
        for overload in {operator, BELOW.get(operator, operator)}:
            lowering.make_fallback(overload, layout_constraint=lowering.constrain_to_fake_tensors, warn=False)
            lowering.lowerings[overload] = functools.partial(_lowered, overload)
    lowering.lowerings[torch.ops.rewrite.quotient.default] = _quotient


class _Called(ir.ExternKernel):
    """A call of one of the `direct.functions`."""

    entry, of_nf4 = "", False

    def codegen(self, wrapper: Any) -> None:
        table = "rewrite_functions_of_nf4" if self.of_nf4 else "rewrite_functions"
        wrapper.add_import_once(f"from {direct.__name__} import functions as _functions")
        wrapper.add_import_once(f"{table} = _functions(of_nf4={self.of_nf4})")
        self.python_kernel_name = f"{table}[{self.entry!r}]"
        super().codegen(wrapper)


class _Direct(_Called, ir.FallbackKernel):
    """The function allocates its results."""


class _Into(_Called, ir.ExternKernelOut):
    """The result goes into a buffer of Inductor's; arguments are nested, as those of a fallback."""

    codegen_args = ir.FallbackKernel.codegen_args  # type: ignore[assignment]


def _lowered(operator: torch._ops.OpOverload, *args: Any) -> Any:
    node = V.graph.current_node
    name = operator._schema.name.removeprefix("rewrite::")
    fake = node.meta["val"]
    fake = fake[0] if isinstance(fake, (tuple, list)) else fake
    kernel = ir.FallbackKernel
    over = name in direct.OVER and isinstance(node.args[0], fx.Node) and is_last_use(node.args[0], node)
    if over:
        name, operator = f"{name}_", getattr(torch.ops.rewrite, f"{name}_").default
    if fake.device.type == "cpu" and not V.graph.cpp_wrapper:
        entry = direct.entry_of(name, node.args)
        if entry.endswith(" into"):
            return ir.TensorBox.create(_into(entry, operator, *args))
        kernel = type("Direct", (_Direct,), {"entry": entry, "of_nf4": _of_nf4(args)})
    found = tree_map_only(ir.IRNode, ir.TensorBox.create, kernel.create(operator, *args))
    return [args[0], found] if over else found


def _into(entry: str, operator: torch._ops.OpOverload, *args: Any) -> ir.IRNode:
    with V.graph.fake_mode:
        result, tensors, others, unflatten, _ = ir.FallbackKernel.process_kernel(operator, *args)
    sizes, strides = (convert_shape_to_inductor(n) for n in (result.size(), result.stride()))
    layout = ir.FixedLayout(result.device, result.dtype, sizes, strides)
    kernel = _Into(layout, tensors, others, op_overload=operator)
    kernel.entry, kernel.unflatten_args = entry, unflatten  # type: ignore[attr-defined]
    kernel.of_nf4 = _of_nf4(args)
    return kernel


def _of_nf4(args: Sequence[Any]) -> bool:
    return any(isinstance(value, str) and operators.stores_nf4(value) for value in args)


def _quotient(a: ir.TensorBox, b: ir.TensorBox) -> ir.TensorBox:
    result = lowering.lowerings[torch.ops.aten.div.Tensor](a, b)
    result.realize()
    return result


def is_last_use(value: fx.Node, user: fx.Node) -> bool:
    """Whether no node after `user` reads a value, or what shares its memory, and it is no input of the graph."""
    shared, root = {_memory(value)}, value
    while _is_view(root) and isinstance(given := root.args[0], fx.Node):
        root = given
        shared.add(_memory(root))
    nodes = list(user.graph.nodes)
    read = {n for n in nodes if n.op in ("placeholder", "get_attr")}
    read.update(*(node.all_input_nodes for node in nodes[nodes.index(user) + 1 :]))
    return None not in shared and all(_memory(n) not in shared for n in read)


def _is_view(node: fx.Node) -> bool:
    shares = torch.ops.aten._unsafe_view.default  # and does not say so
    return isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target is shares)


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
