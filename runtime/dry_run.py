"""One training step of a model under fake tensors, through `torch.compile` as far as the partitioned graphs.

What is counted there is what a real step keeps and computes, at any size, without memory and without a device: the
model is copied without its numbers, captured by Dynamo, rewritten by our pipeline, differentiated and decomposed as
Inductor asks, and partitioned by `passes.partition`.  No kernel is generated.  The copy stands on a fake CPU, whose
attention is of the flash kind: it keeps queries, keys, values, the output and one number a row, as on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rewrite.passes.partition import CUT, Partitioner
from rewrite.passes.record import GraphRecord
from rewrite.runtime.attach import attachment
from rewrite.runtime.backend import lowered
from rewrite.runtime.compiled import entry_of, settings

Tensor = torch.Tensor


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; the model itself, however large, is not copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        bare = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="meta")
    return copy.deepcopy(model, memo)


def dry_run(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[GraphRecord]:
    """The records of the training graphs that one call of `model` is captured as, counted at the sizes of its inputs.

    The model, attached or bare, stays as it is; its tensors and those of the inputs may be on any device, also meta.

    Example: `dry_run(model, kwargs={"input_ids": ids, "labels": ids})[0].counts["saved_bytes"]`
    """
    mode, records = FakeTensorMode(allow_non_fake_inputs=True), list[GraphRecord]()
    faked, batch = _faked(without_numbers(model), mode), _faked_batch(args, kwargs, mode)
    call = torch.compile(entry_of(faked), backend=_counting(records, attachment(model) is not None), dynamic=False)
    with torch._dynamo.config.patch(settings()), torch.enable_grad(), mode:
        call(faked, *batch[0], **batch[1])
    return records


def eager_bytes(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Bytes that autograd keeps for the backward of an eager step, each storage once, under fake tensors.

    Parameters, buffers and inputs are not counted.  On a CPU dropout keeps its mask in the dtype of its input, where a
    GPU keeps a byte.
    """
    mode, kept = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Any]()
    faked, batch = _faked(without_numbers(model), mode), _faked_batch(args, kwargs, mode)
    inputs = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    known = {t.untyped_storage()._cdata for t in (*faked.parameters(), *faked.buffers(), *inputs)}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept.setdefault(storage._cdata, storage)
        return tensor

    with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        faked(*batch[0], **batch[1])
    return sum(storage.nbytes() for storage in kept.values())


def _counting(records: list[GraphRecord], attached: bool) -> Callable[..., Any]:
    """A backend that counts; a model with nothing attached is counted as PyTorch compiles it."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # Imported here: Inductor takes a second to load, and `import rewrite` should not.
        from torch._dynamo.backends.debugging import boxed_nop
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        record = GraphRecord(title=f"step_{len(records)}", training=True)
        gm, finish = lowered(gm, record, True if attached else None)
        records.append(record)

        def inner(gm: fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
            return boxed_nop(gm, inputs)

        cut = CUT if attached else {}
        partitioner = Partitioner(record, thorough=True, decompositions=select_decomp_table(), cut=cut)
        with config.patch(custom_partitioner_fn=partitioner, fx_graph_cache=False):
            return finish(compile_fx(gm, inputs, inner_compile=inner))  # type: ignore[arg-type]

    return backend


def _faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with fake tensors in place of its own; tensors that modules share stay shared."""
    known: dict[int, Any] = {}
    for held in _tables(model):
        for name, tensor in held.items():
            if tensor is None:
                continue
            if id(tensor) not in known:
                fake = _fake(tensor.detach(), mode)
                shared = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                known[id(tensor)] = shared
            held[name] = known[id(tensor)]
    return model


def _faked_batch(args: Sequence[Any], kwargs: Mapping[str, Any] | None, mode: FakeTensorMode) -> Any:
    return tree_map_only(Tensor, lambda t: _fake(t, mode), (tuple(args), dict(kwargs or {})))


def _tables(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield module._parameters
        yield module._buffers


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad
        )
