"""Grafts on an exported program: the same typed functions, spliced into its graph as ATen operators.

Nothing can fall back past an exported graph, so a planned site that no edit reached is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from rewrite.codegen.typed import typed_op
from rewrite.errors import RewriteError
from rewrite.passes.splice import boundary, module_calls, splice
from rewrite.runtime.adapter import ADAPTERS
from rewrite.runtime.graft import Graft, leading

log = logging.getLogger(__name__)
Tensor = torch.Tensor


def apply_grafts(program: ExportedProgram, grafts: Sequence[Graft]) -> ExportedProgram:
    """A new exported program with `grafts` spliced in; `program` keeps its graph and its tensors.

    Adapter tensors become parameters named as on a live model; everything else is frozen.  Dropout is off.
    Raises `RewriteError` where a graft finds no node to take hold of.
    """
    editor = _Editor(program)
    made = {id(g): editor.theta(g) for g in grafts if g.where in ("input", "output", "weight")}
    ordered = sorted(grafts, key=lambda g: g.stage)
    for graft in ordered:
        if graft.where in ("input", "output"):
            getattr(editor, f"add_{graft.where}")(graft, made[id(graft)])
        elif graft.where == "train":
            editor.add_train(graft)
    # Each goes between the weight and what reads it so far: the last one first.
    for graft in reversed(ordered):
        if graft.where == "weight":
            editor.add_weight(graft, made[id(graft)])
    for graft in grafts:
        if graft.where == "storage":
            editor.add_storage(graft)
    return editor.finish()


class _Editor:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.gm = copy.deepcopy(program.graph_module)
        self.graph = self.gm.graph
        self.specs = list(program.graph_signature.input_specs)
        self.state: dict[str, Any] = {
            name: nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t
            for name, t in program.state_dict.items()
        }
        self.shared: dict[str, fx.Node] = {}
        self.inputs = {n.name: n for n in self.graph.find_nodes(op="placeholder")}

    def parameter(self, name: str, value: Tensor, trainable: bool) -> fx.Node:
        """A new parameter input of the program."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        mode = next(n.meta["val"].fake_mode for n in self.inputs.values() if hasattr(n.meta.get("val"), "fake_mode"))
        node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
        kind = InputKind.PARAMETER
        self.specs.insert(0, InputSpec(kind, TensorArgument(name=node.name), target=name))
        self.state[name] = nn.Parameter(value.detach(), requires_grad=trainable)
        return node

    def weights(self, graft: Graft) -> list[fx.Node]:
        """The inputs that hold the tensor of a graft: one, unless modules share it under several names."""
        targets = [f"{path}.{graft.tensor}" for path in graft.places]
        names = [s.arg.name for s in self.specs if s.target in targets and isinstance(s.arg, TensorArgument)]
        if not names:
            raise RewriteError(f"the exported program does not read {targets[0]}: {graft.label} has no place there")
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name in names]

    def theta(self, graft: Graft) -> list[fx.Node]:
        """The inputs that hold what a graft's op takes after the tensors of the module, as they start."""
        weight = self.state[f"{graft.path}.{graft.tensor}"].detach()
        start = {n: torch.empty(s.held, dtype=s.dtype, device=weight.device) for n, s in graft.slots.items()}
        for name, slot in graft.slots.items():
            if slot.shared in self.shared:
                start[name] = self.state[self.target(self.shared[slot.shared])].detach()
            elif slot.shared and slot.fill is not None:
                slot.fill(start[name])
        if graft.initialise is not None:
            graft.initialise(graft.view(weight), {n: leading(t, graft.slots[n]) for n, t in start.items()})
        prefix = f"{graft.path}.{ADAPTERS}.{graft.name}."
        nodes = {}
        for name, slot in reversed(list(graft.slots.items())):
            known = self.shared.get(slot.shared)
            nodes[name] = known or self.parameter(prefix + name, start[name], slot.trainable)
            if slot.shared:
                self.shared[slot.shared] = nodes[name]
        gate = [self.parameter(prefix + "gate", torch.ones(()), False)] if graft.gated else []
        return [*(nodes[name] for name in graft.slots), *gate]

    def target(self, node: fx.Node) -> str:
        """The name of the tensor that an input holds."""
        return next(str(s.target) for s in self.specs if isinstance(s.arg, TensorArgument) and s.arg.name == node.name)

    def add_output(self, graft: Graft, theta: list[fx.Node]) -> None:
        op = _operation(graft)
        read = [self.read(f"{graft.path}.{name}") for name in graft.reads]
        for x, y in self.calls(graft):
            users = list(y.users)
            new = splice(self.graph, functools.partial(op, training=False), [x, y, *read, *theta], y, graft.label)
            for user in users:
                user.replace_input_with(y, new)

    def add_input(self, graft: Graft, theta: list[fx.Node]) -> None:
        op = _operation(graft)
        for call in module_calls(self.graph, graft.path):
            if (edge := boundary(call)) is not None:
                x = edge[0]
                users = [n for n in x.users if n in call]
                last = next(n for n in self.graph.nodes if n in users)
                new = splice(self.graph, functools.partial(op, training=False), [x, *theta], last.prev, graft.label)
                for user in users:
                    user.replace_input_with(x, new)

    def calls(self, graft: Graft) -> list[tuple[fx.Node, fx.Node]]:
        """(input, output) of every call of the module of a graft."""
        found = [b for call in module_calls(self.graph, graft.path) if (b := boundary(call)) is not None]
        if not found:
            raise RewriteError(
                f"no node of the exported program computes {graft.path}: {graft.label} has no place there"
            )
        return found

    def read(self, name: str) -> fx.Node | None:
        """The input that holds a tensor of the model, or None where it has no such tensor."""
        names = [s.arg.name for s in self.specs if s.target == name and isinstance(s.arg, TensorArgument)]
        return next((n for n in self.graph.nodes if n.op == "placeholder" and n.name in names), None)

    def add_weight(self, graft: Graft, theta: list[fx.Node]) -> None:
        for weight in self.weights(graft):
            self.replace(weight, _operation(graft), [weight, *theta], graft.label)

    def add_storage(self, graft: Graft) -> None:
        op = typed_op(graft.op)
        assert op is not None
        assert graft.encode is not None
        name = f"{graft.path}.{graft.tensor}"
        stored = graft.encode(graft.view(self.state[name].detach()).contiguous())
        count = len(stored)
        nodes = [
            self.parameter(f"{graft.path}.parametrizations.{graft.tensor}.original{i}", stored[i], False)
            for i in reversed(range(count))
        ][::-1]
        (old,) = self.weights(graft)
        self.replace(old, functools.partial(_decoded, graft, op.reference), nodes, op.name)
        self.graph.erase_node(old)
        self.specs = [s for s in self.specs if s.target != name]
        del self.state[name]

    def replace(self, old: fx.Node, function: Callable[..., Any], tensors: list[fx.Node], name: str) -> None:
        """Let every reader of a weight read what a function makes of some inputs."""
        users = [u for u in old.users if u.op != "output"]
        last = next(n for n in reversed(list(self.graph.nodes)) if n.op == "placeholder")
        new = splice(self.graph, function, tensors, last, name)
        for user in users:
            user.replace_input_with(old, new)

    def add_train(self, graft: Graft) -> None:
        for name in graft.slots:
            key = f"{graft.path}.{name}"
            self.state[key] = nn.Parameter(self.state[key].detach().clone())

    def finish(self) -> ExportedProgram:
        self.graph.lint()
        self.gm.recompile()
        old = self.program
        return ExportedProgram(
            root=self.gm,
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.specs, self.outputs()),
            state_dict=self.state,
            range_constraints=copy.deepcopy(old.range_constraints),
            module_call_graph=copy.deepcopy(old.module_call_graph),
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=list(old.verifiers),
        )

    def outputs(self) -> list[OutputSpec]:
        """The output specs by the nodes that are returned now: one of them may be a site."""
        specs, (output,) = self.program.graph_signature.output_specs, self.graph.find_nodes(op="output")
        return [
            dataclasses.replace(spec, arg=TensorArgument(name=node.name))
            if isinstance(spec.arg, TensorArgument) and isinstance(node, fx.Node)
            else spec
            for spec, node in zip(specs, output.args[0], strict=True)
        ]


def _decoded(graft: Graft, reference: Callable[..., Any], *stored: Tensor) -> Tensor:
    return graft.map.stored(reference(*stored), graft.shape)


def _operation(graft: Graft) -> Callable[..., Any]:
    """What a graft computes from the tensors that are held, of which a shared one may be larger than its own part."""
    op = typed_op(graft.op)
    assert op is not None
    slots, after = list(graft.slots.values()), 1 if graft.gated else 0

    def call(*args: Any, **kwargs: Any) -> Any:
        first = len(args) - len(slots) - after
        own = [leading(t, slot) for t, slot in zip(args[first:], slots, strict=False)]
        return op.reference(*args[:first], *own, *args[len(args) - after :], **kwargs)

    return call
