"""The `torch.compile` backend: copy the graph, run the pipeline, hand over to Inductor (or run it as it is).

`torch.compile(model, backend="rewrite")` finds it by entry point; a graph without adapters goes to Inductor
untouched.  `options={"backend": "eager" | "aot_eager" | "inductor"}` chooses what runs the rewritten graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from rewrite.codegen.kernels import tune
from rewrite.errors import RewriteError
from rewrite.passes import deferred, pipeline
from rewrite.passes.partition import Partitioner
from rewrite.passes.record import GraphRecord
from rewrite.runtime import capture, captures
from rewrite.runtime.lazy_logits import returning
from rewrite.runtime.signature import inputs_of

BACKENDS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_numbers = itertools.count()


def rewrite_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one captured graph.

    `mode` is Inductor's, one of `MODES`; `options` are Inductor's, plus `backend`, `mode` (torch.compile takes no other
    option beside its own), and `chunked_loss` (true): whether a training graph's loss is computed in chunks of rows
    (docs/loss.md).
    """
    settings = dict(options or {})
    engine = check_backend(settings.pop("backend", "inductor"))
    mode = check_mode(settings.pop("mode", mode))
    chunked_loss = settings.pop("chunked_loss", None)
    record = GraphRecord(title=f"graph_{next(_numbers)}", training=torch.is_grad_enabled())
    tensors = list(capture.adapter_tensors(gm)) or list(capture.parameters(gm))
    gm, finish = lowered(gm, record, chunked_loss)
    compiled = finish(_engine(engine, gm, example_inputs, record, mode, settings))
    if record.passes:  # not before it is compiled: a graph that Dynamo gives up to start over never runs
        captures.remember(record, tensors)
    return compiled


def lowered(
    gm: fx.GraphModule, record: GraphRecord, chunked_loss: bool | None = None
) -> tuple[fx.GraphModule, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """A captured graph after our pipeline, and what the function compiled from it must be wrapped in.

    A graph without adapters comes back as it is, unless its caller says what is to become of its loss.
    """
    record.arguments = tuple(capture.path_of(n) for n in gm.graph.nodes if n.op == "placeholder")
    if chunked_loss is None and not capture.has_adapters(gm):
        return gm, lambda compiled: compiled
    record.inputs = inputs_of(gm)
    reason = getattr(gm, "compile_subgraph_reason", None)
    record.broken = reason is not None and reason.graph_break
    gm = capture.copy_graph(gm)
    pipeline.run(gm, record, pipeline.without("loss") if chunked_loss is False else pipeline.PIPELINE)
    outputs = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    later = deferred.split(gm, record)
    return gm, lambda compiled: returning(compiled, outputs, later)


def _engine(
    name: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    record: GraphRecord,
    mode: str | None,
    options: dict[str, Any],
) -> Callable[..., Any]:
    if name == "eager":
        return gm.forward
    if name == "aot_eager":
        return _aot_eager(gm, inputs, record)
    return _inductor(gm, inputs, record, mode, options)


def check_backend(name: str) -> str:
    """`name` if it is one of `BACKENDS`; raises `RewriteError` with the choices otherwise."""
    if name not in BACKENDS:
        raise RewriteError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name


def check_mode(name: str | None) -> str | None:
    """`name` if it is one of `MODES` or None; raises `RewriteError` with the choices otherwise."""
    if name is not None and name not in MODES:
        raise RewriteError(f"unknown mode {name!r}: choose one of {', '.join(MODES)}")
    return name


def _aot_eager(gm: fx.GraphModule, inputs: Sequence[Any], record: GraphRecord) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import boxed_nop

    compiler = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=Partitioner(record),
        keep_inference_input_mutations=True,
    )
    return compiler(gm, inputs)


def _inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    record: GraphRecord,
    mode: str | None,
    options: dict[str, Any],
) -> Callable[..., Any]:
    # Imported here: Inductor takes a second to load, and `import rewrite` should not.
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    from rewrite.codegen import lowering
    from rewrite.passes.below_autograd import BelowAutograd

    patches: dict[str, Any] = {**(list_mode_options(mode) if mode else {}), **options}
    if record.passes:
        patches["custom_partitioner_fn"] = Partitioner(record, decompositions=select_decomp_table())
        asked = patches.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass)
        patches["post_grad_custom_pre_pass"] = BelowAutograd(asked)
    if patches.get("max_autotune", config.max_autotune):
        tune.ask()
    lowering.install()
    # As an argument, not around the call: a backward graph with symbolic sizes is compiled when it first runs.
    return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[arg-type]
