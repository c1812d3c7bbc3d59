"""How graphs compiled for a CPU call our operators: those in C++ where they take the call, functions in Python else.

Called by their own names, operators that are written in Python go from a generated source through the dispatcher, into
Python again.  Beside products that stream through the caches, so much code is cold whenever it runs: in a training step
of a small model on two cores it was a few percent of the time.  And an operator that allocates its result gets fresh
pages, whose first writes are slow; large results go into buffers that Inductor hands out, and uses again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from rewrite.codegen import branches, columns, dropout, ops, row_norms
from rewrite.codegen.below import BELOW
from rewrite.codegen.cpu import operators

_PYTHON: dict[str, Callable[..., Any]] = {
    "adapted_linear_core": ops.routed_core,
    "linear_input_gradient": ops.routed_input_gradient,
    "low_rank_gradients": branches.low_rank_gradients,
    "sum_of_products": branches.sum_of_products,
    "factor_gradient": branches.factor_gradient,
    "column_sums": columns.column_sums,
    "scaled_sums": columns.scaled_sums,
    "scaled_sums_": columns.scaled_sums_,
    "dropout": dropout.dropped,
    "dropped_linear_core": dropout.linear,
    "dropped_linear_gradients": dropout.linear_gradients,
    "adapted_row_norms": row_norms.adapted_row_norms,
}
"""By the name of the operator, what it is on a CPU."""
_NEVER = {"factor_gradient"}  # in C++
_INTO = {"adapted_linear_core", "linear_input_gradient", "sum_of_products", "dropout"}
"""Those in C++ that can write into a buffer."""
_OVER = {"scaled_sums"}
"""Those whose first result can take the place of their first argument: then they are `<name>_`."""


@functools.cache
def functions(of_nf4: bool = False) -> dict[str, Callable[..., Any]]:
    """What generated sources call: by the name of the operator, `<name> in C++` for calls that C++ takes.

    `<name> into` takes `out=` besides, a buffer for the result.  Those for weights in NF4 need more to be compiled.
    """
    found, table = operators.loaded_with_nf4() if of_nf4 else operators.loaded(), dict(_PYTHON)
    for name, function in _PYTHON.items():
        if name not in _NEVER:
            table[f"{name} in C++"] = function if found is None else getattr(found, name).default
        if name in _INTO:
            table[f"{name} into"] = _copied(function) if found is None else getattr(found, name).out
    return table


def _copied(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, out: out.copy_(function(*args))


def _entry(name: str, args: Sequence[Any]) -> str:
    """Which of the `functions` an operator is for the arguments of a node of a graph."""
    values = fx.map_arg(args, lambda node: node.meta["val"])
    if name == "adapted_linear_core":
        x, weight, layout, *_, skip = values  # type: ignore[misc]
        takes = operators.product_unsuitable(x, weight, layout, skip) is None
    elif name == "linear_input_gradient":
        takes = operators.input_gradient_unsuitable(values[2]) is None  # type: ignore[arg-type]
    elif name == "adapted_row_norms":
        weight, layout, A, B, _ = values  # type: ignore[misc]
        takes = operators.norms_serve(weight, layout, A, B)
    else:
        takes = name not in _NEVER
    return name if not takes else f"{name} into" if name in _INTO else f"{name} in C++"


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


@functools.cache
def install() -> None:
    """Tell Inductor; once a process, before it compiles.  Sources that it generates import what they call."""
    from torch._inductor import ir, lowering
    from torch._inductor.utils import convert_shape_to_inductor
    from torch._inductor.virtualized import V

    class Called(ir.ExternKernel):
        """A call of one of the `functions`."""

        entry, of_nf4 = "", False

        def codegen(self, wrapper: Any) -> None:
            table = "rewrite_functions_of_nf4" if self.of_nf4 else "rewrite_functions"
            wrapper.add_import_once(f"from {__name__} import functions as _functions")
            wrapper.add_import_once(f"{table} = _functions(of_nf4={self.of_nf4})")
            self.python_kernel_name = f"{table}[{self.entry!r}]"
            super().codegen(wrapper)

    class Direct(Called, ir.FallbackKernel):
        """The function allocates its results."""

    class Into(Called, ir.ExternKernelOut):
        """The result goes into a buffer of Inductor's; arguments are nested, as those of a fallback."""

        codegen_args = ir.FallbackKernel.codegen_args  # type: ignore[assignment]

    def of_nf4(args: Sequence[Any]) -> bool:
        return any(isinstance(value, str) and operators.stores_nf4(value) for value in args)

    def into(entry: str, operator: torch._ops.OpOverload, *args: Any) -> ir.IRNode:
        with V.graph.fake_mode:
            result, tensors, others, unflatten, _ = ir.FallbackKernel.process_kernel(operator, *args)
        sizes, strides = (convert_shape_to_inductor(n) for n in (result.size(), result.stride()))
        layout = ir.FixedLayout(result.device, result.dtype, sizes, strides)
        kernel = Into(layout, tensors, others, op_overload=operator)
        kernel.entry, kernel.unflatten_args = entry, unflatten  # type: ignore[attr-defined]
        kernel.of_nf4 = of_nf4(args)
        return kernel

    def lowered(operator: torch._ops.OpOverload, *args: Any) -> Any:
        node = V.graph.current_node
        name = operator._schema.name.removeprefix("rewrite::")
        fake = node.meta["val"]
        fake = fake[0] if isinstance(fake, (tuple, list)) else fake
        kernel = ir.FallbackKernel
        over = name in _OVER and isinstance(node.args[0], fx.Node) and is_last_use(node.args[0], node)
        if over:
            name, operator = f"{name}_", getattr(torch.ops.rewrite, f"{name}_").default
        if fake.device.type == "cpu" and not V.graph.cpp_wrapper:
            entry = _entry(name, node.args)
            if entry.endswith(" into"):
                return ir.TensorBox.create(into(entry, operator, *args))
            kernel = type("Direct", (Direct,), {"entry": entry, "of_nf4": of_nf4(args)})
        found = tree_map_only(ir.IRNode, ir.TensorBox.create, kernel.create(operator, *args))
        return [args[0], found] if over else found

    for name in _PYTHON:
        operator = getattr(torch.ops.rewrite, name).default
        for overload in {operator, BELOW.get(operator, operator)}:
            lowering.make_fallback(overload, layout_constraint=lowering.constrain_to_fake_tensors, warn=False)
            lowering.lowerings[overload] = functools.partial(lowered, overload)

    def quotient(a: ir.TensorBox, b: ir.TensorBox) -> ir.TensorBox:
        result = lowering.lowerings[torch.ops.aten.div.Tensor](a, b)
        result.realize()
        return result

    lowering.lowerings[torch.ops.rewrite.quotient.default] = quotient
