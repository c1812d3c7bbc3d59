"""The trace of an exported program: the graph is there already, only its names are put where the resolver looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from rewrite.passes.splice import boundary, module_calls
from rewrite.structure.trace import Call, Trace, Value


def of_program(program: ExportedProgram) -> Trace:
    """A `Trace` with the operators, modules and parameters of an exported program."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(program.graph, mapping)
    names = _names(program)
    for old, new in mapping.items():
        new.meta = {"val": _value(old.meta.get("val")), "scope": _scope(old)}
        if new.op == "placeholder":
            new.meta["names"] = names.get(old.name, ())
            new.meta["input"] = old.name in program.graph_signature.user_inputs
    found = Trace(graph)
    for path in {path for parts in names.values() for path in (p.rpartition(".")[0] for p in parts)}:
        for call in module_calls(program.graph, path):
            if (edge := boundary(call)) is not None:
                found.calls.append(Call(path, (mapping[edge[0]],), (mapping[edge[1]],)))
    results = next(iter(program.graph.find_nodes(op="output"))).all_input_nodes
    found.calls.append(Call("", (), tuple(mapping[n] for n in results if n in mapping)))
    return found


def _names(program: ExportedProgram) -> dict[str, tuple[str, ...]]:
    """Placeholder -> all names of the parameter that it is."""
    same: dict[int, list[str]] = {}
    for name, tensor in program.state_dict.items():
        same.setdefault(tensor.data_ptr(), []).append(name)
    return {
        spec.arg.name: tuple(same.get(program.state_dict[spec.target].data_ptr(), [spec.target]))
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER and spec.target in program.state_dict
    }


def _scope(node: fx.Node) -> tuple[str, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(path.partition("@")[0] for path, _ in stack.values())


def _value(val: Any) -> Any:
    if isinstance(val, (tuple, list)):
        return type(val)(_value(v) for v in val)
    if not isinstance(val, torch.Tensor):
        return _hint(val) if isinstance(val, torch.SymInt) else val
    sizes = tuple(s if isinstance(s, int) else _hint(s) for s in val.shape)
    return Value(sizes, (), val.dtype)


def _hint(size: Any) -> int:
    """The size that a symbolic dimension had in the example."""
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 2
