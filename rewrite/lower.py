"""From placements to grafts: where a method takes hold, and whether its factors or its dense matrix are computed.

What is computed there, `rewrite.functions` derives from the method's one view.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rewrite import functions
from rewrite.blocks import Block
from rewrite.codegen.forms import IN, OUT, TOKENS, Base, Form
from rewrite.codegen.maps import Matmul
from rewrite.functions import Here
from rewrite.method import Method, Param, asks_shape, states
from rewrite.passes.keep import Placed
from rewrite.planning import Placement, Plan
from rewrite.regime import Regime
from rewrite.runtime import attach as attaching
from rewrite.runtime import graft as runtime
from rewrite.runtime.graft import Behaviour, Graft, Side, Slot
from rewrite.sites import Site

Tensor = torch.Tensor
TOKENS_AT_HAND = 2048
"""Tokens in a step at which costs are compared: what a site sees is not known when it is lowered."""


def attach(model: nn.Module, plan: Plan, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Carry out a plan on a model, in place; `values` (of a checkpoint) replace the initialisers."""
    return attaching.attach(
        model,
        grafts(plan),
        policies=regimes(plan),
        spec=plan.spec,
        sites=plan.rows(),
        notes=plan.notes,
        values=values,
        rules=rules(plan),
    )


def grafts(plan: Plan) -> list[Graft]:
    """The grafts of a plan, in its order."""
    changed = Counter(p.site.weight for p in plan.placements if p.method.view() in ("weight", "delta"))
    measured = any(isinstance(p.method, Regime) and p.method.measures for p in plan.policies)
    made = [lower(placed, changed[placed.site.weight] < 2, measured) for placed in plan.placements]
    return _shared(_networks(plan.placements, made))


def regimes(plan: Plan) -> list[runtime.Regime]:
    """How a plan trains what it trains."""
    found = []
    for policy in plan.policies:
        if isinstance(method := policy.method, Regime):
            found.append(
                runtime.Regime(
                    str(policy.clause),
                    method.choose if states(method, "choose", Regime) else None,
                    method.choices(len(policy.sites)),
                    tuple(site.path for site in policy.sites),
                    method.counts,
                    method.gradient,
                    getattr(method, "eps", 0.0),
                    getattr(method, "q", 1),
                )
            )
    return found


def rules(plan: Plan) -> list[Placed]:
    """What the policies of a plan say about values that a step saves, by the path of the module."""
    found: dict[Placed, None] = {}
    for policy in plan.policies:
        rule = policy.method.keeps(policy.clause.approximate)
        if rule is None:
            continue
        rule = replace(rule, label=str(policy.clause))
        places = [(s.path, _family(s)) for s in policy.sites] if policy.clause.sites is not None else [("", "")]
        found |= {(path, replace(rule, family=family)): None for path, family in places}
    return list(found)


def _family(site: Site) -> str:
    """The name for the sites of a block that a rule takes together, '' for one that stands alone."""
    group = site.roles[0].partition(".")[0]
    return group if group in ("attn", "cross", "ffn", "mixer") else ""


def lower(placed: Placement, alone: bool = True, measured: bool = False) -> Graft:
    """One placement as a graft; `alone` says that no other method changes the same weight, `measured` that something
    asks what its adapters are worth."""
    site, method = placed.site, placed.method
    params, view, clause = method.params(site), method.view(), str(placed.clause)
    common: dict[str, Any] = {
        "path": site.path,
        "name": placed.name,
        "tensor": site.place.tensor,
        "shape": site.place.stored,
        "map": site.place.map,
        "rows": site.rows,
        "label": str(placed.clause.call).removesuffix("()"),
        "adapter": placed.clause.label,
        "stage": STAGES.index(view),
    }
    if view == "storage":
        return _storage(method, site, common)
    if view == "train":
        slots = {name: Slot(shape, site.dtype) for name, shape in placed.trained}
        return Graft(where="train", slots=slots, **common)
    if view == "side":
        return _side(placed, common)
    if site.entry is not None:  # a graft of the model, which knows its embedding by name
        common |= {"path": "", "tensor": site.place.parameter}
    gated = bool(placed.clause.label) or (measured and view not in ("tokens", "past"))
    here = Here(method, tuple(params), site.rows, site.place.map, gated)
    if asks_shape(type(method)):
        here = replace(here, shape=(site.out_features, site.in_features))
    return Graft(
        gated=gated,
        slots=_slots(params, site.dtype, clause),
        initialise=functools.partial(_initialise, method, params),
        merged=functions.merged(here),
        sharers=site.place.tied if site.shared else (),
        behaviour=_behaviour(method, clause),
        **_MAKE[view](here, site, alone),
        **common,
    )


STAGES = ("storage", "weight", "delta", "output", "input", "tokens", "past", "side", "train")
"""The order in which methods at one site compose, whatever their order in the spec; within a stage, that of the spec.

A rewritten weight is that of the base, updates add to it, and what scales an output scales all of it.
"""


def _delta(here: Here, site: Site, alone: bool) -> dict[str, Any]:
    factored, shifts, route = _decided(here, _shapes(here, site), site.in_features, site.out_features)
    if site.place.called and (factored or shifts or getattr(here.method, "dropout", 0.0)):
        return {"where": "output", "op": functions.branch(here, factored), "route": route}
    return {"where": "weight", "op": functions.updated(here), "route": route}


def _weight(here: Here, site: Site, alone: bool) -> dict[str, Any]:
    factored, shifts, route = _decided(here, _shapes(here, site), site.in_features, site.out_features)
    if factored and not (alone and site.rows is None):
        factored, route = False, "materialised, since other methods change the weight or it is a part of one"
    needs_input = shifts or bool(getattr(here.method, "dropout", 0.0))
    if site.place.called and isinstance(here.layer, Matmul) and (factored or needs_input):
        op, reads = functions.rewritten_branch(here, factored), (site.place.tensor, "bias")
        return {"where": "output", "op": op, "route": route, "reads": reads}
    return {"where": "weight", "op": functions.reparametrised(here), "route": route}


Shapes = tuple[tuple[tuple[int, ...], torch.dtype | None], ...]


def _shapes(here: Here, site: Site) -> Shapes:
    """Shapes and dtypes of the weight as a matrix and of the tensors of a method."""
    theta = here.method.params(site).values()
    return ((*site.leading, site.out_features, site.in_features), None), *((p.shape, p.dtype) for p in theta)


@functools.cache
def _decided(here: Here, shapes: Shapes, columns: int, rows: int) -> tuple[bool, bool, str]:
    """(whether a method computes with its factors, whether it shifts the bias, the choice in words where there was one)
    at sites of these shapes."""
    W, *theta = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    named, method = dict(zip(here.names, theta, strict=True)), here.method
    if method.view() == "delta":
        form: Form | Tensor = here.update(named)
        shifts = form.shift() is not None
    else:
        form, shifts = method.weight(Base(W), **named), states(method, "shifted")
    if not (isinstance(form, Form) and form.has_factors(here.layer)):
        return False, shifts, "materialised, it has no cheaper form there"
    if form.is_light():
        return True, shifts, ""
    factored, dense = costs(form, columns, rows)
    cheaper, words = factored <= dense, f"{factored:.2g} against {dense:.2g} multiply-adds at {TOKENS_AT_HAND} tokens"
    return cheaper, shifts, f"factored, {words}" if cheaper else f"materialised, factors would take {words}"


def costs(form: Form, columns: int, rows: int) -> tuple[float, float]:
    """Multiply-adds of a training step beyond those of the layer: through the factors, and with the dense matrix.

    A backward pass costs twice its forward; that of a weight which is formed has the gradient of all of it.  Light
    factors are not asked: they keep everything of the size of the weight out of the backward pass.
    """
    sizes = {TOKENS: TOKENS_AT_HAND, IN: columns, OUT: rows}
    return tuple(float(c.subs(sizes)) for c in (3 * form.cost(), 3 * form.formation() + TOKENS * IN * OUT))  # type: ignore[return-value]


def _output(here: Here, site: Site, alone: bool) -> dict[str, Any]:
    return {"where": "output", "op": functions.activation(here)}


def _input(here: Here, site: Site, alone: bool) -> dict[str, Any]:
    return {"where": "input", "op": functions.fed(here)}


def _virtual(here: Here, site: Site, alone: bool) -> dict[str, Any]:
    return {"where": here.method.view(), "op": functions.virtual(here)}


_MAKE: dict[str, Callable[[Here, Site, bool], dict[str, Any]]] = {
    "delta": _delta,
    "weight": _weight,
    "output": _output,
    "input": _input,
    "tokens": _virtual,
    "past": _virtual,
}


def _side(placed: Placement, common: dict[str, Any]) -> Graft:
    site, method, clause = placed.site, placed.method, str(placed.clause)
    params, block = method.params(site), site.block
    assert block is not None
    taps = site.part in ("entry", "rung")
    names = functions.asked(method.tap if taps else method.join, params)
    here = Here(method, names, None, site.place.map, bool(placed.clause.label))
    side = Side(
        part=site.part,
        net=clause,
        stack=block.stack,
        then=functools.partial(_after, method.step if taps else method.close, block),
        names=names,
        causal=block.causal,
        reads=block.memory > 0,
        layer=block.index,
        sources=block.matrices if site.part == "rung" else {},
        wiring=block.wiring if method.through and site.part == "rung" else None,
    )
    return Graft(
        where="side",
        gated=bool(placed.clause.label),
        op=None if site.part == "memory" else functions.tapped(here) if taps else functions.joined(here),
        slots=_slots(params, site.dtype, clause),
        initialise=functools.partial(_initialise, method, params),
        behaviour=_behaviour(method, clause),
        side=side,
        **{**common, "tensor": ""},
    )


def _after(then: Callable[..., Any], block: Block, s: Any, *given: Any) -> Any:
    """The next state of a side network, as `Side.then` is called."""
    *seen, call, theta = given
    return then(s, *seen, call, block, theta)


def _networks(placements: Sequence[Placement], made: Sequence[Graft]) -> list[Graft]:
    """Grafts of side networks that know which of them start together, and whose past keys and values are whose."""
    clauses: dict[str, list[Placement]] = {}
    for placed in placements:
        if placed.method.view() == "side":
            clauses.setdefault(str(placed.clause), []).append(placed)
    starts = {
        clause: functools.partial(group[0].method.start, [p.site for p in group])
        for clause, group in clauses.items()
        if states(group[0].method, "start")
    }
    numbers, found = itertools.count(), []
    for placed, graft in zip(placements, made, strict=True):
        if graft.side is not None and placed.site.block is not None:
            slot = placed.site.block.count + next(numbers)
            graft = replace(graft, side=replace(graft.side, slot=slot, start=starts.get(str(placed.clause))))
        found.append(graft)
    return found


def _storage(method: Method, site: Site, common: dict[str, Any]) -> Graft:
    whole = {**common, "rows": None}
    return Graft(
        where="storage",
        op=functions.stored(method.name, str(method.layout(site))),
        encode=method.encode,
        read=method.read,
        **whole,
    )


def _behaviour(method: Method, clause: str) -> Behaviour:
    return Behaviour(
        clause,
        method.regulariser if states(method, "regulariser") else None,
        method.schedule if states(method, "schedule") else None,
        method.calibration,
        method.calibrated if method.calibration else None,
        method.reselect if states(method, "reselect") else None,
    )


def _slots(params: dict[str, Param], base: torch.dtype, clause: str) -> dict[str, Slot]:
    # Adapters of a half-precision base train in float32; they are cast down in the graph, activations never up.
    dtype = torch.float32 if base.itemsize < 4 else base
    return {
        n: Slot(p.shape, p.dtype or dtype, p.trainable, f"{clause}.{n}" if p.shared else "", p.lr, p.decay, fill=p.init)
        for n, p in params.items()
    }


def _shared(made: list[Graft]) -> list[Graft]:
    """Grafts whose shared tensors know how large they are: as the largest site of their clause needs them."""
    whole: dict[str, tuple[int, ...]] = {}
    for graft in made:
        for slot in graft.slots.values():
            if slot.shared:
                known = whole.get(slot.shared, slot.shape)
                whole[slot.shared] = tuple(map(max, known, slot.shape))
    return [_widened(graft, whole) for graft in made]


def _widened(graft: Graft, whole: dict[str, tuple[int, ...]]) -> Graft:
    if not any(slot.shared for slot in graft.slots.values()):
        return graft
    slots = {n: replace(s, whole=whole[s.shared]) if s.shared else s for n, s in graft.slots.items()}
    return replace(graft, slots=slots)


def _initialise(method: Method, params: dict[str, Param], W: Tensor, held: dict[str, Tensor]) -> None:
    """Fill the tensors of a graft, `held`, for the matrix W."""
    for name, param in params.items():
        if not param.shared:  # filled once, as a whole
            param.init(held[name])
    dtype = next((t.dtype for t in held.values() if t.is_floating_point()), W.dtype)
    method.initialise(W.to(dtype), held)
