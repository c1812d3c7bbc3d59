"""One forward of a model as a graph of ATen operators, without running it: what roles are derived from.

The forward runs on a fake copy (`FakeTensorMode`: shapes alone, no memory, the user's model is never touched)
under a dispatch mode that records every operator, which module asked for it, and every parameter that it reads.
A model whose control flow asks for values is run once for real instead, on the same small batch.
Nothing here says what an operator is for: that is `rewrite.structure.attention` and its siblings.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from rewrite.structure.inputs import Inputs, candidates

Tensor = torch.Tensor
LARGE = 4 << 30
"""Bytes of parameters above which a model is not run for real."""


@dataclass(frozen=True)
class Call:
    """One call of a module: the nodes of its tensor arguments and of its result, a tensor or (not `single`) several."""

    path: str
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    single: bool = True


@dataclass
class Trace:
    """A recorded forward.

    Nodes carry `meta["val"]` (a tensor without data), `meta["scope"]` (paths of the modules that are running,
    outermost first); placeholders carry `meta["names"]`, all names of the parameter that they are, and
    `meta["input"]` where they are of the batch.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    calls: list[Call] = field(default_factory=list)


class TraceError(Exception):
    """No batch that could be made ran through the model; `str` says why the best of them did not."""


def alias(value: Any, writer: Any) -> Any:
    """A tensor read after somebody wrote to memory that it shares."""
    return value


def record(model: nn.Module, batch: Inputs | None = None) -> Trace:
    """Record one forward of `model` on `batch`, or on the first batch made from its signature that runs.

    Raises `TraceError` where none does.  The model, its random state and its mode stay as they are.
    """
    batches = [batch] if batch is not None else candidates(model)
    first: Exception | None = None
    with _quiet(), torch.no_grad():
        for found, run in itertools.product(batches, (_fake, _real)):
            try:
                with torch.random.fork_rng(devices=_devices(model)):
                    return run(model, found)
            except Exception as error:  # whatever a model raises, the next batch may do
                first = first or error
    raise TraceError(f"{type(first).__name__}: {str(first).partition(chr(10))[0]}" if first else "no batch to try")


def _devices(model: nn.Module) -> list[int]:
    """The GPUs whose random state a forward may change."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Operators that do not run are no news here: the next batch is tried."""
    log = logging.getLogger("torch._subclasses.fake_tensor")

    def nothing(_: logging.LogRecord) -> bool:
        return False

    log.addFilter(nothing)
    try:
        yield
    finally:
        log.removeFilter(nothing)


def _fake(model: nn.Module, batch: Inputs) -> Trace:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        copied = copy.deepcopy(model).eval()
    fake = tree_map_only(Tensor, mode.from_tensor, (batch.args, batch.kwargs))
    with mode:
        return _recorded(copied, *fake)


def _real(model: nn.Module, batch: Inputs) -> Trace:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > LARGE or any(p.is_meta for p in model.parameters()):
        raise TraceError("its forward asks for values, and it is too large to be run for them")
    modes = {m: m.training for m in model.modules()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    try:
        return _recorded(model.eval(), batch.args, batch.kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
        for name, value in model.named_buffers():
            if name in buffers and buffers[name].shape == value.shape:
                value.copy_(buffers[name])


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    recorder = Recorder(model)
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            recorder.name(tensor, None).meta["input"] = True
    with _without_hooks(model), recorder.watching(), recorder, _slow_attention():
        model(*args, **kwargs)
    recorder.trace.graph.lint()
    return recorder.trace


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks are the user's (or ours): they are not run for a look at the model."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    held = [(module, name, getattr(module, name)) for module in model.modules() for name in names]
    for module, name, _ in held:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooked in held:
            setattr(module, name, hooked)


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Torch's own encoder layers run as one opaque operator in inference, unless told not to."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Recorder(TorchDispatchMode):
    """Records operators as nodes; a tensor is known by its identity, memory written in place by its storage."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.graph = self.trace.graph
        self.nodes: Any = WeakTensorKeyDictionary()  # tensor -> its node
        self.written: dict[int, tuple[Any, fx.Node]] = {}  # storage -> (kept alive, last writer)
        self.names = {m: path for path, m in model.named_modules()}  # keeps those alive that a forward replaces
        self.scope: list[str] = []
        self.last: fx.Node | None = None  # of the placeholders
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in self.nodes:
                self.nodes[parameter].meta["names"] += (name,)
            else:
                self.name(parameter, name)

    def name(self, tensor: Tensor, parameter: str | None) -> fx.Node:
        """A placeholder for a tensor that no recorded operator made."""
        with self.graph.inserting_after(self.last) if self.last else contextlib.nullcontext():
            node = self.graph.placeholder("p_" + parameter.replace(".", "_") if parameter else "x")
        self.last = node
        node.meta = {"val": _bare(tensor), "scope": (), "names": (parameter,) if parameter else ()}
        self.nodes[tensor] = node
        return node

    def node(self, tensor: Tensor) -> fx.Node:
        """The node behind a tensor, as it is now."""
        known = self.nodes.get(tensor)
        if known is None:
            known = self.name(tensor, None)
        writer = self.written.get(_storage(tensor), (None, None))[1]
        if writer is not None and writer is not known and known < writer:
            known = self.add(alias, (known, writer), {}, tensor)
        return known

    def add(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"val": _bare(value), "scope": tuple(self.scope)}
        if isinstance(value, Tensor):
            self.nodes[value] = node
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _grouped(func, args) if func in _GROUPED else func(*args, **kwargs)
        if func in _PASSIVE:
            return result
        read_args, read_kwargs = tree_map_only(Tensor, self.node, (args, kwargs))
        node = self.add(func, read_args, read_kwargs, result)
        if isinstance(result, (tuple, list)):
            for number, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.add(operator.getitem, (node, number), {}, part)
        for tensor in _mutated(func, args, kwargs):
            self.nodes[tensor] = node if isinstance(result, Tensor) else self.nodes[tensor]
            self.written[_storage(tensor)] = tensor.untyped_storage(), node
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep `scope` as modules are entered and left, and note what goes in and comes out."""
        entered: list[tuple[fx.Node, ...]] = []

        def enter(module: nn.Module, args: Any) -> None:
            self.scope.append(self.names.get(module, self.scope[-1] if self.scope else ""))
            entered.append(tuple(self.node(t) for t in tree_leaves(args) if isinstance(t, Tensor)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            outputs = tuple(self.node(t) for t in _tensors(output))
            self.trace.calls.append(Call(self.scope.pop(), entered.pop(), outputs, isinstance(output, Tensor)))

        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


_GROUPED = {torch.ops.aten._grouped_mm.default}


def _grouped(func: Any, args: Any) -> Tensor:
    """A grouped product; its fake form takes bfloat16 alone, where the real one takes more."""
    x, weight = args[:2]
    if not isinstance(x, FakeTensor):
        return func(*args)
    return x.new_empty(*([weight.shape[0]] if x.ndim == 3 else []), x.shape[-2], weight.shape[-1])


_PASSIVE = {torch.ops.aten.detach.default, torch.ops.prim.device.default}


def _tensors(output: Any) -> list[Tensor]:
    """The tensors directly in an output: a tensor, or the members of a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [t for t in parts if isinstance(t, Tensor)] if isinstance(parts, Iterable) else []


@dataclass(frozen=True)
class Value:
    """What a recorded tensor was, without its data; `constant` where a forward wrote its numbers down."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None = field(default=None, compare=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _bare(value: Any) -> Any:
    return tree_map_only(Tensor, _value, value)


def _value(tensor: Tensor) -> Value:
    strided = tensor.layout == torch.strided
    constant = getattr(tensor, "constant", None)  # which fake tensors made of literals carry
    return Value(tuple(tensor.shape), tuple(tensor.stride()) if strided else (), tensor.dtype, constant)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse tensors have none
        return -id(tensor)


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found
