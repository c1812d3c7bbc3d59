"""The partitioner: pins what is static, cuts the joint graph by min-cut, and counts what the cut keeps.

Rules about what is kept (`passes.keep`) are carried out here: regions to recompute are tagged before the cut, a
budget bounds it, and what it keeps is encoded after it.

A thorough one also counts what PyTorch's default partition would keep, which is what an eager step keeps, and plays
the schedule of both halves for the memory that they take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, TypeVar
from unittest import mock

from torch import fx
from torch._functorch import config, partitioners
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

from rewrite.codegen import codecs
from rewrite.passes import accumulate, columns, counting, encode, keep, pin_static, recompute
from rewrite.passes.gradients import gradient_costs
from rewrite.passes.keep import Budgeted, Encoded, Recomputed
from rewrite.passes.peak import peaks
from rewrite.passes.record import GraphRecord, PassRecord

CUT: Mapping[str, Any] = {"ban_recompute_materialized_backward": False}
"""Settings of PyTorch's partitioner, which by itself keeps what a product in the backward reads: outputs of norms,
gated products.  Computed again from what is kept anyhow, in kernels that read it anyhow, they cost no time that could
be measured, and were a quarter to a third of what a Llama under LoRA kept."""

_R = TypeVar("_R", bound=keep.Rule)


class Partitioner(CustomPartitionerFn):
    """`pin_static` and `accumulate`, PyTorch's min-cut partition, then `columns`; `record.counts` is what it found."""

    def __init__(
        self,
        record: GraphRecord,
        thorough: bool = False,
        decompositions: encode.Decompositions | None = None,
        cut: Mapping[str, Any] = CUT,
    ) -> None:
        self.record, self.thorough, self.decompositions, self.cut = record, thorough, decompositions, cut

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        outputs = int(kwargs["num_fwd_outputs"])
        static = kwargs.get("static_lifetime_input_indices") or []
        frozen, trained = _parameters(gm.graph, static, outputs)
        self._run(lambda: pin_static.pin_static(gm.graph, frozen, trained))
        plain = self._default(gm, joint_inputs, **kwargs) if self.thorough else {}
        plain |= {"gradients": self._gradients(gm, outputs)} if self.thorough else {}
        self._run(lambda: accumulate.accumulate(gm.graph))
        if self._rules(Recomputed):
            self._run(lambda: recompute.recompute(gm.graph))
        kwargs.setdefault("compiler", "inductor")
        names = {n.name for n in (*frozen, *trained)}
        budgets = [rule.fraction for rule in self._rules(Budgeted)]
        # A copy in fewer bits is of what a product reads, as in eager.
        cut = {} if self._rules(Encoded) else dict(self.cut)
        with config.patch(cut), _bounded(min(budgets), names) if budgets else nullcontext():
            forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        if self._rules(Encoded):
            args = forward, backward, outputs, self.record.rules, self.record, names, self.decompositions
            self._run(lambda: encode.encode(*args))
        for part in (forward, backward):
            self._run(lambda part=part: columns.columns(part.graph))
            part.recompile()
        self.record.counts = self._counts(forward, backward, outputs) | plain
        return forward, backward

    def _rules(self, kind: type[_R]) -> list[_R]:
        return [rule for _, rule in self.record.rules if isinstance(rule, kind)]

    def _run(self, step: Callable[[], PassRecord]) -> None:
        begin = time.perf_counter()
        done = step()
        done.seconds = time.perf_counter() - begin
        self.record.passes.append(done)

    def _counts(self, forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> dict[str, Any]:
        saved = counting.saved_for_backward(forward, outputs)
        counts = {
            "saved": [asdict(s) for s in saved],
            "saved_bytes": sum(s.bytes for s in saved),
            "forward_flops": counting.flops(forward.graph),
            "backward_flops": counting.flops(backward.graph),
        }
        return counts | {"peaks": peaks(forward, backward, outputs)} if self.thorough else counts

    def _gradients(self, gm: fx.GraphModule, outputs: int) -> list[dict[str, Any]]:
        """What every gradient costs, from the loss downwards, by the name of what it is the gradient of."""
        names = dict(enumerate(self.record.arguments))
        return [{"name": names.get(c.input, ""), **asdict(c)} for c in gradient_costs(gm.graph, outputs)]

    def _default(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> dict[str, Any]:
        """What PyTorch's default partition of the same joint graph keeps: everything that eager autograd does."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        outputs, known = int(kwargs["num_fwd_outputs"]), ("num_fwd_outputs", "static_lifetime_input_indices")
        found = {name: kwargs[name] for name in known if name in kwargs}
        forward, _ = default_partition(fx.GraphModule(gm, graph), joint_inputs, **found)
        saved = counting.saved_for_backward(forward, outputs)
        return {"default_saved": [asdict(s) for s in saved]}

    def uuid(self) -> Any:
        """Identifies this partitioner in Inductor's caches: the files that decide what it does."""
        files = (part.__file__ for part in (accumulate, codecs, columns, counting, encode, keep, pin_static, recompute))
        return get_hash_for_files((__file__, *files), repr((self.record.rules, self.cut)))

    def __reduce__(self) -> tuple[Any, ...]:
        """As what identifies it: PyTorch 2.11 pickles all of Inductor's settings for the key of its cache."""
        return bytes, (self.uuid(),)


@contextmanager
def _bounded(fraction: float, parameters: Collection[str]) -> Iterator[None]:
    """Bound what min-cut saves.

    It measures the bound from the bytes of all inputs up to what it would save, and so never binds where the
    parameters that no backward reads, as the embedding of a frozen model, are more than the activations: here
    parameters count nothing, they live anyway.
    """
    size_of = partitioners._size_of

    def size(node: fx.Node) -> int:
        return 0 if node.op == "placeholder" and node.name in parameters else size_of(node)

    with config.patch(activation_memory_budget=fraction), mock.patch.object(partitioners, "_size_of", size):
        yield


def _parameters(graph: fx.Graph, static: Sequence[int], outputs: int) -> tuple[list[fx.Node], list[fx.Node]]:
    """The parameter inputs of a joint graph, as (frozen, trained): trained ones have a gradient output."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
    results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    gradients = results[outputs:]  # one per input, None where there is none
    values = {i: inputs[i] for i in static if i < len(inputs)}
    trained = [n for i, n in values.items() if i < len(gradients) and gradients[i] is not None]
    return [n for n in values.values() if n not in trained], trained
