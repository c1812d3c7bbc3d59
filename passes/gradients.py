"""What each gradient of a joint graph costs: the operators that are its own, and its part of the chain to the input.

Everything is counted on the graph: a backward operator is one that depends on a tangent, and a gradient needs those
that it is computed from.  What is needed for one gradient alone is its own (dW); what others need too is the chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from rewrite.passes import counting


@dataclass(frozen=True)
class GradientCost:
    """FLOPs of the gradient of input number `input` of a joint graph.

    `own` are those of operators that no other gradient needs.  `chain` are those of the others, beyond what the
    gradients before it in the list need: from the loss down to where the gradient branches off.
    """

    input: int
    own: int
    chain: int


@dataclass(frozen=True)
class _Counted:
    """The backward operators that cost something, as bits, and which of them each gradient needs."""

    flops: tuple[int, ...]
    needed: dict[int, int]

    def total(self, bits: int) -> int:
        return sum(cost for n, cost in enumerate(self.flops) if bits >> n & 1)


def gradient_costs(joint: fx.Graph, outputs: int) -> list[GradientCost]:
    """The cost of every gradient of a joint graph with `outputs` results, from the nearest to the loss downwards."""
    counted = _count(joint, outputs)
    shared = _shared(list(counted.needed.values()))
    chains = {n: bits & shared for n, bits in counted.needed.items()}
    lengths = {n: counted.total(bits) for n, bits in chains.items()}
    found, before = [], 0
    for number in sorted(chains, key=lambda n: lengths[n]):
        own = counted.total(counted.needed[number] & ~shared)
        found.append(GradientCost(number, own, counted.total(chains[number] & ~before)))
        before |= chains[number]
    return found


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the gradients of the results of a joint graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def selected_flops(joint: fx.Graph, outputs: int, inputs: Iterable[int]) -> int:
    """FLOPs of the backward operators that the gradients of these inputs need, each operator once."""
    counted, bits = _count(joint, outputs), 0
    for number in inputs:
        bits |= counted.needed[number]
    return counted.total(bits)


def _count(joint: fx.Graph, outputs: int) -> _Counted:
    flops: list[int] = []
    needs: dict[fx.Node, int | None] = {}  # None: no part of the backward
    for node in joint.nodes:
        if node.op == "placeholder":
            needs[node] = 0 if "tangents" in str(node.target) else None
        elif node.op != "output":
            parts = [bits for n in node.all_input_nodes if (bits := needs[n]) is not None]
            bits = None if not parts else _joined(parts)
            if bits is not None and (cost := counting.result_flops(node)):
                bits |= 1 << len(flops)
                flops.append(cost)
            needs[node] = bits
    results = next(n for n in reversed(joint.nodes) if n.op == "output").args[0]
    gradients = {n: g for n, g in enumerate(results[outputs:]) if isinstance(g, fx.Node)}
    return _Counted(tuple(flops), {n: needs[g] or 0 for n, g in gradients.items()})


def _joined(parts: Iterable[int]) -> int:
    bits = 0
    for part in parts:
        bits |= part
    return bits


def _shared(parts: Sequence[int]) -> int:
    """The bits that more than one of these has."""
    once = twice = 0
    for part in parts:
        twice |= once & part
        once |= part
    return twice
