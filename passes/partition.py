"""The partitioner: pins what is static, cuts the joint graph by min-cut, and counts what the cut keeps.

A thorough one also counts what PyTorch's default partition would keep, which is what an eager step keeps, and plays
the schedule of both halves for the memory that they take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import fx
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

from rewrite.passes import counting, pin_static
from rewrite.passes.gradients import gradient_costs
from rewrite.passes.peak import peaks
from rewrite.passes.record import GraphRecord


class Partitioner(CustomPartitionerFn):
    """`pin_static`, then PyTorch's min-cut partition; fills `record.counts` with what it found."""

    def __init__(self, record: GraphRecord, thorough: bool = False) -> None:
        self.record, self.thorough = record, thorough

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        begin = time.perf_counter()
        static = kwargs.get("static_lifetime_input_indices") or []
        frozen, trained = _parameters(gm.graph, static, int(kwargs["num_fwd_outputs"]))
        done = pin_static.pin_static(gm.graph, frozen, trained)
        done.seconds = time.perf_counter() - begin
        self.record.passes.append(done)
        plain = self._default(gm, joint_inputs, **kwargs) if self.thorough else {}
        plain |= {"gradients": self._gradients(gm, int(kwargs["num_fwd_outputs"]))} if self.thorough else {}
        kwargs.setdefault("compiler", "inductor")
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        self.record.counts = self._counts(forward, backward, int(kwargs["num_fwd_outputs"])) | plain
        return forward, backward

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
        return get_hash_for_files((__file__, pin_static.__file__, counting.__file__))


def _parameters(graph: fx.Graph, static: Sequence[int], outputs: int) -> tuple[list[fx.Node], list[fx.Node]]:
    """The parameter inputs of a joint graph, as (frozen, trained): trained ones have a gradient output."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
    results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    gradients = results[outputs:]  # one per input, None where there is none
    values = {i: inputs[i] for i in static if i < len(inputs)}
    trained = [n for i, n in values.items() if i < len(gradients) and gradients[i] is not None]
    return [n for n in values.values() if n not in trained], trained
