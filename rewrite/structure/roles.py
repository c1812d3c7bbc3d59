"""From a trace to roles: which parameter, or which part of one, plays which role in the function.

Everything here comes from dataflow and from which module contains which; no name is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from rewrite.paths import element_of, list_of, parent
from rewrite.structure import repeated
from rewrite.structure.attention import Attention, attentions
from rewrite.structure.feedforward import feed_forwards
from rewrite.structure.flow import Flow, Projection, common
from rewrite.structure.operators import ACTIVATION, ADD, SELECTION, VIEW, name_of
from rewrite.structure.repeated import Called, Heads
from rewrite.structure.replay import channels
from rewrite.structure.trace import Trace


@dataclass(frozen=True)
class Part:
    """A role that a parameter has: all of it, or the output channels `entries` of it.

    `head` is how many of these belong to one head of an attention; of its output projection, how many inputs do.
    """

    role: str
    entries: tuple[int, ...] | None = None
    cross: bool = False
    head: int | None = None


@dataclass
class Use:
    """How a model uses one parameter."""

    kind: str
    output: int  # dimension of the parameter that counts output channels
    input: int | None  # dimension that is summed over
    parts: list[Part] = field(default_factory=list)
    called: bool = True  # its module's own call computes nothing but its product


@dataclass
class Structure:
    """What a trace says about a model: the use of every parameter that takes part in a product, by its name,
    the modules that are attention or another sequence mixer, and the modules around residual adds."""

    uses: dict[str, Use] = field(default_factory=dict)
    attention: dict[str, bool] = field(default_factory=dict)  # module path -> cross
    mixers: set[str] = field(default_factory=set)
    residual: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)  # parameters read outside of their own module's call
    heads: dict[str, Heads] = field(default_factory=dict)  # by the path of the module that attends
    calls: dict[str, Called] = field(default_factory=dict)  # of elements of lists of modules
    sources: dict[str, str] = field(default_factory=dict)  # parameter of a product -> the module that made its input
    activations: dict[str, str] = field(default_factory=dict)  # by the last parameter of a feed-forward network


def derive(trace: Trace, blocks: tuple[str, ...] = ()) -> Structure:
    """The structure of a traced model; `blocks` are the paths of its repeated lists of modules."""
    return _Deriver(Flow(trace), blocks).structure(trace)


class _Deriver:
    def __init__(self, flow: Flow, blocks: tuple[str, ...]) -> None:
        self.flow, self.blocks = flow, blocks
        self.found = Structure()

    def stack(self, path: str) -> str:
        """The list of blocks that a path is in."""
        return list_of(path, self.blocks)

    def block(self, path: str) -> str:
        """The block that a path is in."""
        return element_of(path, self.blocks)

    def structure(self, trace: Trace) -> Structure:
        flow, found = self.flow, self.found
        for projection in flow.projections.values():
            use = Use(projection.kind, projection.labels.output, projection.labels.input)
            found.uses.setdefault(projection.parameter, use)
        for name, use in found.uses.items():
            use.called = all(_own_call(flow, p) for p in flow.by_parameter[name])
        self.through = flow.through_depthwise()
        for attention in attentions(self.through):
            self.attention(attention)
        self.heads(trace)
        self.feed_forward()
        self.routers()
        found.mixers = {p for n in flow.mixers for p in n.meta["scope"]} - set(found.attention)
        found.residual = {p for n in flow.residual for p in n.meta["scope"]}
        found.outside = set(_read_outside(trace))
        found.calls = repeated.calls(flow)
        made = repeated.makers(flow)
        inputs = {p.parameter: made.get(flow.strip(p.x)) for p in flow.projections.values()}
        found.sources = {name: path for name, path in inputs.items() if path is not None}
        return found

    def attention(self, attention: Attention) -> None:
        """Query, key, value and output projections of one attention."""
        flow, scope = self.through, attention.scope[-1] if attention.scope else ""
        home = self.block(scope)
        behind = {role: self.inside(home, self.behind(attention, getattr(attention, role))) for role in "qkv"}
        if not behind["q"] and not behind["k"]:
            return
        cross = self.is_cross(behind["q"], behind["k"])
        heads = {"q": attention.head, "k": attention.head, "v": attention.value_head}
        self.found.heads[scope] = Heads(attention.head, cross, repeated.causal(flow, attention))
        for role, projections in behind.items():
            for projection in projections:
                mask = channels(flow, projection, getattr(attention, role))
                self.add(projection, f"attn.{role}", mask, cross, heads[role])
        outputs = self.outputs(home, scope, attention.out)
        for projection in outputs:
            self.add(projection, "attn.o", None, cross, attention.value_head)
        members = [p for ps in behind.values() for p in ps] + outputs[:1]
        owner = common([p.owner for p in members] + [scope])
        if len(owner) > len(self.block(members[0].parameter)):
            self.found.attention[owner] = self.found.attention.get(owner, False) or cross

    def outputs(self, block: str, scope: str, out: fx.Node) -> list[Projection]:
        """The projections right behind an attention: of those that read it, the nearest by module."""
        readers = [self.through.projections[r] for r in self.through.readers(out) if r in self.through.projections]
        depth = {p: len(common([p.owner, scope])) for p in self.inside(block, readers)}
        return [p for p, shared in depth.items() if shared == max(depth.values())]

    def behind(self, attention: Attention, node: fx.Node) -> list[Projection]:
        """What an operand is made of; past residual adds of the attention's own, where there is nothing else."""
        found = self.through.sources(node)
        if found or not attention.scope or node not in self.through.data:
            return found
        wide = self.through.past_residuals()
        around = [p for p in wide.sources(node) if p.owner.startswith(f"{attention.scope[-1]}.")]
        masks = [channels(wide, p, node) for p in around]
        return [p for p, mask in zip(around, masks, strict=True) if mask is None or any(mask)]

    def inside(self, block: str, projections: list[Projection]) -> list[Projection]:
        """Those in a block, where any are: a model may mix streams in ways that no cut tells apart."""
        return [p for p in projections if self.block(p.parameter) == block] or projections

    def is_cross(self, q: list[Projection], k: list[Projection]) -> bool:
        """Whether keys come from another stream than queries."""
        scope = common(p.owner for p in (*q, *k))
        queries, keys = ({s for p in side for s in self.stream(p.x, scope)} for side in (q, k))
        if not queries or not keys or queries & keys:
            return False
        # Keys of an earlier layer of the same stack are shared ones.
        homes = {self.stack(path) for s in keys for path in s.meta["scope"]} - {""}
        return not homes & {self.stack(p.parameter) for p in q}

    def stream(self, node: fx.Node, scope: str) -> set[fx.Node]:
        """Where the input of a projection comes from, back through projections of the same module."""
        found, todo, seen = set[fx.Node](), [node], set[fx.Node]()
        while todo:
            segment = self.flow.segment_before(todo.pop()) - seen
            seen |= segment
            for n in segment:
                inner = self.flow.projections.get(n)
                if inner is not None and scope and inner.owner.startswith(f"{scope}."):
                    todo.append(inner.x)
                elif inner is not None or n in self.flow.residual or n in self.flow.mixers or n.op == "placeholder":
                    found.add(n)
        return found

    def add(
        self,
        projection: Projection,
        role: str,
        mask: tuple[bool, ...] | None,
        cross: bool = False,
        head: int | None = None,
    ) -> None:
        use = self.found.uses[projection.parameter]
        rows = projection.labels.rows
        if mask is None or all(mask):
            entries = rows
        else:
            entries = tuple(rows[i] if rows else i for i, moved in enumerate(mask) if moved)
        same = next((p for p in use.parts if (p.role, p.cross) == (role, cross)), None)
        if same is not None:  # applied a part at a time, as experts are in a loop
            whole = entries is None or same.entries is None
            entries = None if whole else tuple(sorted({*entries, *same.entries}))  # type: ignore[misc]
            use.parts.remove(same)
        if role != "attn.o" or not use.parts:
            use.parts.append(Part(role, entries, cross, head))

    def feed_forward(self) -> None:
        taken = {name for name, use in self.found.uses.items() if use.parts}
        owners = tuple(f"{path}." for path in self.found.attention)
        taken |= {name for name in self.found.uses if name.startswith(owners)}
        for network in feed_forwards(self.flow, taken, self.block):
            self.add(network.down, "ffn.down", None)
            self.found.activations[network.down.parameter] = repeated.activation(self.flow, network.down.x)
            for role, parts in (("ffn.up", network.up), ("ffn.gate", network.gate)):
                for projection, mask in parts:
                    self.add(projection, role, mask)

    def routers(self) -> None:
        """Projections by whose output something is selected."""
        for projection in self.flow.projections.values():
            use = self.found.uses[projection.parameter]
            if projection.kind == "linear" and not use.parts:
                if any(name_of(n) in SELECTION for n in self.flow.segment_after(projection.out)):
                    use.parts.append(Part("router"))

    def heads(self, trace: Trace) -> None:
        """Projections whose output is the model's, but for views and scales."""
        results = {n for call in trace.calls if call.path == "" for n in call.outputs}
        for projection in self.flow.projections.values():
            use = self.found.uses[projection.parameter]
            if projection.kind != "linear" or use.parts:
                continue
            after = self.flow.segment_after(projection.out)
            if after & results and not any(name_of(n) in ACTIVATION for n in after):
                use.parts.append(Part("head"))


def _read_outside(trace: Trace) -> Iterator[str]:
    """Names of the parameters that somebody else than the module that holds them reads."""
    for node in trace.graph.find_nodes(op="placeholder"):
        readers = {user.meta["scope"][-1] if user.meta["scope"] else "" for user in node.users}
        owners = {parent(name) for name in node.meta.get("names", ())}
        if readers - owners:
            yield from node.meta.get("names", ())


def _own_call(flow: Flow, projection: Projection) -> bool:
    """Whether the module that owns the parameter is called, and its call is this product and a bias."""
    path = projection.owner
    scope = projection.scope
    if not scope or scope[-1] != path:
        return False
    calls = [c for c in flow.trace.calls if c.path == path and c.single and c.inputs and c.outputs]
    return any(
        flow.strip(projection.x) is flow.strip(call.inputs[0]) and _bare_output(flow, projection.out, call.outputs[0])
        for call in calls
    )


def _bare_output(flow: Flow, product: fx.Node, output: fx.Node) -> bool:
    """Whether `output` is `product` but for views and the addition of a constant."""
    node = output
    while node is not product:
        name = name_of(node)
        inputs = [a for a in node.all_input_nodes if a in flow.data]
        if len(inputs) != 1 or not (name in VIEW or name in ADD or name in ("transpose", "permute", "t")):
            return False
        node = inputs[0]
    return True
