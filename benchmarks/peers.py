"""Contenders: every way that we know to run the linear layers of a case, ours and those of the peers.

A builder takes a problem and gives a `Contender`, or raises: what is not installed, or does not run, is named with its
error.  `for_method` lists the builders that have a method at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from layers import LAYER, SCALE, Case, Key, Place, Problem
from restated import LoraPath, SlicePath, Weight
from torch import nn

import rewrite

Tensor = torch.Tensor
GRAPHS = "reduce-overhead"


@dataclass
class Contender:
    """A call of linear layers, what it trains in the layout of the problem, and the weights that it multiplies with."""

    call: Callable[..., Sequence[Tensor]]
    module: nn.Module
    trained: dict[Key, Tensor] = field(default_factory=dict)
    weights: Callable[[], list[Tensor]] = list
    columns: dict[int, slice] = field(default_factory=dict)

    @property
    def known(self) -> list[Tensor]:
        """What is held whether a step runs or not."""
        return [*self.module.parameters(), *self.module.buffers(), *self.weights()]


Builder = Callable[..., Contender]


def called(problem: Problem, model: Any, mode: str | None = None) -> Callable[..., Sequence[Tensor]]:
    """A call of a model on the inputs of a problem: as it is, or compiled in a mode of torch.compile."""
    if mode == GRAPHS:
        model = torch.compile(model, dynamic=False, mode=mode)
    elif mode:
        model = torch.compile(model, dynamic=False)
    return partial(problem.call, model)


def layers_of(problem: Problem, model: nn.Module) -> list[Any]:
    """The adapted layers of a model."""
    return [model.get_submodule(place.name) for place in problem.case.places]


def for_method(case: Case) -> dict[str, Builder]:
    """The builders of a method by their names, ours first."""
    gpu, half = case.device.type == "cuda", case.dtype != torch.float32
    found: dict[str, Builder] = {"rewrite": ours}
    if gpu:
        found["rewrite, graphs"] = partial(ours, mode=GRAPHS)
    if case.method in ("lora", "dropout", "dora"):
        found |= _variants("peft", peft, gpu, half)
    if case.method in ("qlora", "qdora"):
        found |= _variants("peft + bitsandbytes", partial(peft, quantised=True), gpu, half)
    if case.method in ("qlora", "nf4"):
        found |= {"torchao": _torchao, "torchao, compiled": partial(_torchao, compiled=True)}
    if case.method in ("lora", "qlora"):
        found |= {"unsloth": _unsloth, "unsloth's path": _unsloth_path}
    if case.method == "s2ft":
        found["s2ft's path"] = _s2ft_path
    if case.method == "multi":
        found |= {"peft": _peft_multi, "loop over adapters": _loop, "loop, compiled": partial(_loop, compiled=True)}
    if case.quantised:
        found["bitsandbytes, frozen"] = _bitsandbytes
    return found | {"base": _base, "base, compiled": partial(_base, mode="default")}


def _variants(name: str, build: Builder, gpu: bool, half: bool) -> dict[str, Builder]:
    """PEFT with adapters in the dtype of the model and in float32, its default; eager and compiled."""
    found: dict[str, Builder] = {name: build, f"{name}, compiled": partial(build, mode="default")}
    if half:
        found[f"{name}, fp32 adapters"] = partial(build, upcast=True)
    if gpu:
        found[f"{name}, graphs"] = partial(build, mode=GRAPHS)
    return found


def fill(trained: dict[Key, Tensor], problem: Problem) -> None:
    """Give what is trained the numbers of the problem; every tensor of it must be there."""
    if trained.keys() != problem.theta.keys():
        raise KeyError(f"trains {sorted(trained)}, the case has {sorted(problem.theta)}")
    with torch.no_grad():
        for key, value in problem.theta.items():
            trained[key].copy_(value)


# Ours


def ours(problem: Problem, mode: str | None = None) -> Contender:
    """`rewrite.compile` on the layers."""
    case = problem.case
    given: dict[str, Any] = {"backend": case.backend, "mode": mode, "inputs": problem.sample}
    model = rewrite.compile(problem.fresh(), spec(case), dynamic=False, **given)
    layers, trained = layers_of(problem, model), dict[Key, Tensor]()
    columns: dict[int, slice] = {}
    for i, place in enumerate(case.places):
        trained |= {(i, name): t for name, t in _held(layers[i], case)}
        if (i, "D") in trained:
            run = rewrite.methods()["s2ft"](channels=case.channels(place)).run(  # type: ignore[attr-defined]
                case.channels(place), place.inputs, False
            )
            columns[i] = slice(run.start, run.stop)
    fill(trained, problem)
    if case.method == "multi":
        rewrite.use(model, per_row=[_adapter(k) for k in problem.adapters])
    return Contender(called(problem, model), model, trained, lambda: [layer.weight for layer in layers], columns)


def spec(case: Case) -> str:
    """What a case is called here."""
    alpha, sites = SCALE * case.rank, case.sites
    adapted = {
        "lora": f"lora(r={case.rank}, alpha={alpha})@{sites}",
        "dropout": f"lora(r={case.rank}, alpha={alpha}, dropout={case.dropout})@{sites}",
        "dora": f"dora(r={case.rank}, alpha={alpha})@{sites}",
        "s2ft": _slices(case),
        "multi": " + ".join(f"{_adapter(k)}: lora(r={r}, alpha={SCALE * r})@{sites}" for k, r in enumerate(case.ranks)),
    }
    adapted |= {"nf4": "", "qlora": adapted["lora"], "qdora": adapted["dora"]}
    stored = f"nf4({sites}, double_quant=true)" if case.quantised else ""
    return " + ".join(part for part in (adapted[case.method], stored) if part)


def _slices(case: Case) -> str:
    sliced = {case.channels(p): [] for p in case.places if case.sliced(p)}
    for place in filter(case.sliced, case.places):
        sliced[case.channels(place)].append(f'"{place.name}"')
    return " + ".join(f"s2ft(channels={count})@{','.join(names)}" for count, names in sliced.items())


def _adapter(number: int) -> str:
    return f"t{number}"


def _held(layer: nn.Module, case: Case) -> Iterator[tuple[str, Tensor]]:
    """What the adapters of one of our layers train."""
    for name, parameter in layer.named_parameters():
        *_, adapter, slot = name.rsplit(".", 2) if parameter.requires_grad else ("", "", "")
        if slot:
            number = adapter.removeprefix("t") if case.method == "multi" else ""
            yield "D" if slot.endswith("columns") else slot + number, parameter


# PEFT


def peft(problem: Problem, mode: str | None = None, upcast: bool = False, quantised: bool = False) -> Contender:
    from peft import LoraConfig, get_peft_model

    case = problem.case
    base = _quantised(problem) if quantised else problem.fresh()
    names = [p.name for p in case.places]
    config = LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALE * case.rank),
        lora_dropout=case.dropout,
        target_modules=names,
        use_dora="dora" in case.method,
    )
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=upcast)  # type: ignore[arg-type]
    layers, trained = layers_of(problem, base), dict[Key, Tensor]()
    for i, layer in enumerate(layers):
        trained |= {(i, name): t for name, t in _peft_tensors(layer, "default", None if upcast else case.dtype)}
    fill(trained, problem)
    call = called(problem, model, mode)
    return Contender(call, model, trained, lambda: [_decoded(layer.base_layer) for layer in layers])


def _peft_tensors(layer: Any, adapter: str, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """What a layer of PEFT trains, in `dtype` where one is given: over quantised weights it always is float32."""
    for name, held in (("A", layer.lora_A), ("B", layer.lora_B), ("m", layer.lora_magnitude_vector)):
        if adapter in held:
            parameter = held[adapter].weight
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
            yield name, parameter


def _peft_multi(problem: Problem) -> Contender:
    """PEFT's batches of mixed adapters."""
    from peft import LoraConfig, get_peft_model

    case, names = problem.case, [p.name for p in problem.case.places]
    base = problem.fresh()
    configs = [LoraConfig(r=r, lora_alpha=int(SCALE * r), target_modules=names) for r in case.ranks]
    model: Any = get_peft_model(base, configs[0], _adapter(0), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for k, config in enumerate(configs[1:], 1):
        model.add_adapter(_adapter(k), config, autocast_adapter_dtype=False)
    trained: dict[Key, Tensor] = {}
    for i, name in enumerate(names):
        for k in range(len(configs)):
            trained |= {(i, f"{n}{k}"): t for n, t in _peft_tensors(getattr(base, name), _adapter(k), case.dtype)}
    for parameter in trained.values():
        parameter.requires_grad_()
    fill(trained, problem)
    per_row = [_adapter(k) for k in problem.adapters]
    return Contender(partial(model, adapter_names=per_row), model, trained, lambda: problem.weights)


# Quantised bases


def _quantised(problem: Problem) -> nn.Module:
    """The layers in NF4 by bitsandbytes, absmax quantised too, as QLoRA has it."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    case, model = problem.case, problem.fresh()
    kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    for place in case.places:
        with torch.device("meta"):
            layer = Linear4bit(place.inputs, place.outputs, bias=False, compute_dtype=case.dtype, **kind)
        weight = model.get_submodule(place.name).weight
        layer.weight = Params4bit(weight.data, requires_grad=False, **kind)  # type: ignore[call-arg]
        model.set_submodule(place.name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by this PEFT knows
    return model.to(case.device)


def _decoded(layer: Any) -> Tensor:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state)


def _bitsandbytes(problem: Problem) -> Contender:
    model = _quantised(problem)
    return Contender(called(problem, model), model, {}, lambda: list(map(_decoded, layers_of(problem, model))))


def _torchao(problem: Problem, compiled: bool = False) -> Contender:
    """Its NF4 tensors with the branch in plain PyTorch."""
    try:
        from torchao.dtypes.nf4tensor import linear_nf4, to_nf4  # type: ignore[import-not-found]
    except ImportError:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4  # type: ignore

    held = [to_nf4(W.clone()) for W in problem.weights]
    model = Branches(problem, lambda x, i: linear_nf4(x, held[i]))
    return model.contender(problem, compiled, lambda: [t.get_original_weight() for t in held])


# Plain PyTorch


class Branches(nn.Module):
    """The branch of LoRA written out beside a base product: what one writes by hand."""

    def __init__(self, problem: Problem, base: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.case, self.base, self.adapters = problem.case, base, problem.adapters
        held = {f"{name}_{i}": nn.Parameter(t.to(self.case.dtype)) for (i, name), t in problem.theta.items()}
        self.held = nn.ParameterDict(held)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [self.one(xs[p.feed], i) for i, p in enumerate(self.case.places)]

    def one(self, x: Tensor, i: int) -> Tensor:
        y = self.base(x, i)
        if self.case.method != "multi":
            return y + SCALE * self.branch(x, i, "") if f"A_{i}" in self.held else y
        return y + SCALE * torch.cat([self.branch(x[r : r + 1], i, str(k)) for r, k in enumerate(self.adapters)])

    def branch(self, x: Tensor, i: int, at: str) -> Tensor:
        return F.linear(F.linear(x, self.held[f"A{at}_{i}"]), self.held[f"B{at}_{i}"])

    def contender(self, problem: Problem, compiled: bool, weights: Callable[[], list[Tensor]]) -> Contender:
        trained = {(i, name): self.held[f"{name}_{i}"] for i, name in problem.theta}
        return Contender(torch.compile(self, dynamic=False) if compiled else self, self, trained, weights)


def _loop(problem: Problem, compiled: bool = False) -> Contender:
    """One branch a row, by hand: what one writes where nothing has kernels for it."""
    model = Branches(problem, lambda x, i: F.linear(x, problem.weights[i]))
    return model.contender(problem, compiled, lambda: problem.weights)


def _base(problem: Problem, mode: str | None = None) -> Contender:
    """The frozen layers: what any method costs at least."""
    model = problem.fresh()
    return Contender(called(problem, model, mode), model, {}, lambda: [m.weight for m in layers_of(problem, model)])


# Unsloth, and restatements


def _leaves(problem: Problem) -> nn.ParameterDict:
    held = {f"{name}_{i}": nn.Parameter(t.to(problem.case.dtype)) for (i, name), t in problem.theta.items()}
    return nn.ParameterDict(held)


def _groups(case: Case) -> list[list[tuple[int, Place]]]:
    """Layers by the input that they read; gate and up read one too."""
    return [[(i, p) for i, p in enumerate(case.places) if p.feed == feed] for feed in range(len(case.widths))]


def _unsloth_path(problem: Problem) -> Contender:
    """Restated, see `restated.LoraPath`; NF4 weights are decoded by bitsandbytes, on a GPU into one buffer for all."""
    case, held = problem.case, _leaves(problem)
    model = _quantised(problem) if case.quantised else problem.fresh()
    layers, groups = layers_of(problem, model), _groups(case)
    weights = _decoders(problem, layers) if case.quantised else [partial(_same, m.weight) for m in layers]

    def call(*xs: Tensor) -> list[Tensor]:
        ys: list[Tensor] = []
        for x, group in zip(xs, groups, strict=True):
            adapters = [held[f"{name}_{i}"] for i, _ in group for name in "AB"]
            ys += LoraPath.apply(x, [weights[i] for i, _ in group], SCALE, *adapters)
        return ys

    module = nn.ModuleList([model, held])
    trained = {(i, name): held[f"{name}_{i}"] for i, name in problem.theta}
    return Contender(call, module, trained, lambda: list(map(_decoded, layers)))


def _same(W: Tensor) -> Tensor:
    return W


def _decoders(problem: Problem, layers: Sequence[Any]) -> list[Weight]:
    from bitsandbytes.functional import dequantize_4bit

    case, gpu = problem.case, problem.case.device.type == "cuda"  # on a CPU it decodes into no buffer
    largest = max(p.inputs * p.outputs for p in case.places)
    buffer = torch.empty(largest, dtype=case.dtype, device=case.device)

    def decoder(place: Place, layer: Any) -> Weight:
        weight = layer.weight
        into = buffer[: place.inputs * place.outputs].view(place.outputs, place.inputs) if gpu else None
        return lambda: dequantize_4bit(weight.data, weight.quant_state, out=into)

    return [decoder(place, layer) for place, layer in zip(case.places, layers, strict=True)]


def _unsloth(problem: Problem) -> Contender:
    """The package's own autograd function of one layer, for layers that share no input."""
    from unsloth.kernels.fast_lora import LoRA_W  # type: ignore[import-not-found]

    case, held = problem.case, _leaves(problem)
    if case.shape == LAYER:
        raise NotImplementedError("its functions of a whole block take its own modules: see the single shapes")
    base = _quantised(problem) if case.quantised else problem.fresh()
    layers = layers_of(problem, base)
    states = [getattr(layer.weight, "quant_state", None) for layer in layers]

    def call(*xs: Tensor) -> list[Tensor]:
        return [
            LoRA_W.apply(x, layers[i].weight, states[i], held[f"A_{i}"], held[f"B_{i}"], SCALE)
            for i, x in enumerate(xs)
        ]

    trained = {(i, name): held[f"{name}_{i}"] for i, name in problem.theta}
    return Contender(call, nn.ModuleList([base, held]), trained, lambda: list(map(_decoded, layers)))


def _s2ft_path(problem: Problem) -> Contender:
    """Restated, see `restated.SlicePath`: the first columns, whose place changes no cost."""
    case, held = problem.case, _leaves(problem)
    model = problem.fresh()
    frozen = [m.weight for m in layers_of(problem, model)]
    columns = {i: slice(0, case.channels(case.places[i])) for i, _ in problem.theta}
    merged = {i: W.detach().clone() for i, W in enumerate(frozen) if i in columns}
    for i, W in merged.items():
        W[:, columns[i]] += problem.theta[i, "D"].to(W.dtype)

    def call(*xs: Tensor) -> list[Tensor]:
        ys: list[Tensor] = []
        for i, place in enumerate(case.places):
            x = xs[place.feed]
            if i in columns:
                ys.append(SlicePath.apply(x, merged[i], held[f"D_{i}"], columns[i].start, columns[i].stop))
            else:
                ys.append(F.linear(x, frozen[i]))
        return ys

    trained = {(i, name): held[f"{name}_{i}"] for i, name in problem.theta}
    return Contender(call, nn.ModuleList([model, held]), trained, lambda: [W.detach() for W in frozen], columns)
