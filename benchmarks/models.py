"""Llama models with random numbers, whole: ours and the peers, and what they compute in higher precision.

`layer` and `layers` are one and two decoder layers of Llama-3-8B with the norm behind them, as in the middle of the
model: their input wants a gradient.  `1b` has the sizes of Llama-3.2-1B, a head and a loss; `small` is for a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from checks import compute, errors
from layers import BOUNDS, PROJECTIONS, SCALE, Batch, Case, Found, Key, Place, Problem, output
from peers import Builder, Contender, layers_of, peft
from restated import LlamaLayer, compiled_pointwise
from torch import nn

Tensor = torch.Tensor
Sizes = dict[str, int]

EIGHT: Sizes = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
MODELS: dict[str, tuple[Sizes, bool]] = {
    "layer": ({**EIGHT, "num_hidden_layers": 1}, False),
    "layers": ({**EIGHT, "num_hidden_layers": 2}, False),
    "1b": (
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "num_hidden_layers": 16,
        },
        True,
    ),
    "small": (
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "vocab_size": 4096,
            "num_hidden_layers": 4,
        },
        True,
    ),
}
"""Sizes, and whether there is a head and a loss."""
METHODS = ("lora", "dropout", "qlora", "dora", "qdora")
SEQUENCE = 2048
"""Tokens of a row at most; more tokens are more rows."""


@dataclass(frozen=True)
class ModelCase(Case):
    """A method on a whole model; `shape` is its name."""

    @cached_property
    def sizes(self) -> Sizes:
        found, by = dict(MODELS[self.shape][0]), self.shrink
        for name in ("hidden_size", "intermediate_size", "vocab_size"):
            found[name] = max(64, found[name] // by)
        heads = max(1, MODELS[self.shape][0]["num_attention_heads"] // by)
        return {**found, "num_attention_heads": heads, "num_key_value_heads": min(heads, found["num_key_value_heads"])}

    @property
    def head(self) -> bool:
        return MODELS[self.shape][1]

    @property
    def sites(self) -> str:
        return "linear-head" if self.head else "linear"

    @cached_property
    def places(self) -> list[Place]:
        sizes, found = self.sizes, list[Place]()
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
        shapes = {
            "q,o": (hidden, hidden),
            "k,v": (hidden, narrow),
            "gate,up": (hidden, inner),
            "down": (inner, hidden),
        }
        for i in range(sizes["num_hidden_layers"]):
            for name, _, shape in PROJECTIONS:
                part = "self_attn" if name[0] in "qkvo" else "mlp"
                path = f"{'model.' if self.head else ''}layers.{i}.{part}.{name}"
                found.append(Place(path, 0, *shapes[shape]))
        return found

    @property
    def rows(self) -> int:
        return max(1, self.tokens // SEQUENCE)

    def described(self) -> dict[str, Any]:
        found = super().described()
        del found["shape"], found["linears"]
        return {**found, "model": self.shape, "layers": self.sizes["num_hidden_layers"], "rows": self.rows}


class ModelProblem(Problem):
    """The numbers of a model, a batch of embeddings that want a gradient, and labels where it has a loss."""

    def drawn(self) -> list[Tensor]:
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

        case: Any = self.case
        torch.manual_seed(0)
        config = LlamaConfig(**case.sizes, use_cache=False, max_position_embeddings=8192)
        with torch.device(case.device):
            model = (LlamaForCausalLM if case.head else LlamaModel)(config)
        self.base = model.to(case.dtype).requires_grad_(False).train()
        for name, parameter in self.base.named_parameters():
            if "norm" in name:
                parameter.add_(self.normal(tuple(parameter.shape), 0.1))
        shape = (case.rows, case.tokens // case.rows)
        vocabulary = config.vocab_size
        self.labels = torch.randint(vocabulary, shape, generator=self.random, device=case.device) if case.head else None
        self.sample = {"inputs_embeds": torch.zeros(*shape, config.hidden_size, dtype=case.dtype, device=case.device)}
        if self.labels is not None:
            self.sample["labels"] = self.labels
        return [m.weight for m in layers_of(self, self.base)]

    def batch(self) -> Batch:
        case: Any = self.case
        shape = (case.rows, case.tokens // case.rows, case.sizes["hidden_size"])
        x = self.normal(shape, 1).to(case.dtype).requires_grad_()
        dy = torch.ones((), device=case.device) if case.head else self.normal(shape, 1).to(case.dtype)
        return Batch([x], [dy])

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def call(self, model: Callable[..., Any], *xs: Tensor) -> Sequence[Tensor]:
        if self.labels is not None:
            return [model(inputs_embeds=xs[0], labels=self.labels).loss]
        return [model(inputs_embeds=xs[0]).last_hidden_state]


class Formula(nn.Module):
    """A layer by the formula of its method."""

    def __init__(self, case: Case, weight: Tensor, own: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.weight, self.own = case, nn.Parameter(weight, requires_grad=False), own

    def forward(self, x: Tensor) -> Tensor:
        return output(self.case, x, self.weight, self.own, None, [], None)


def check(contender: Contender, problem: ModelProblem) -> dict[str, float]:
    """Errors against the formulas in float64, on a GPU in float32; without dropout, whose masks `linears.py` checks."""
    case, batch = problem.case, problem.batches[0]
    dtype = torch.float32 if case.device.type == "cuda" else torch.float64
    model: Any = problem.fresh().to(dtype)
    theta = {k: problem.theta[k].to(dtype).requires_grad_() for k in contender.trained}
    for i, (place, weight) in enumerate(zip(case.places, contender.weights(), strict=True)):
        own = {name: value for (at, name), value in theta.items() if at == i}
        model.set_submodule(place.name, Formula(case, weight.detach().to(dtype), own))
    x = batch.xs[0].detach().to(dtype).requires_grad_()
    ys = problem.call(model, x)
    dys = [dy.to(y.dtype) for y, dy in zip(ys, batch.dys, strict=True)]
    dx, *gradients = torch.autograd.grad(ys, [x, *theta.values()], dys)
    expected = Found([y.detach() for y in ys], [dx], dict(zip(theta, gradients, strict=True)))
    with _without_dropout(contender, case):
        return errors(compute(contender, batch), expected)


@contextmanager
def _without_dropout(contender: Contender, case: Case) -> Iterator[None]:
    contender.module.train(not case.dropout)
    try:
        yield
    finally:
        contender.module.train()


def bound(case: ModelCase) -> float:
    """Errors of the layers add up as if they were independent."""
    return 2 * BOUNDS[case.dtype] * case.sizes["num_hidden_layers"] ** 0.5


def for_method(case: ModelCase) -> dict[str, Builder]:
    """The builders of a method by their names, ours first."""
    from peers import for_method

    layers = {"torchao", "torchao, compiled", "unsloth", "unsloth's path"}
    found = {name: build for name, build in for_method(case).items() if name not in layers}
    quantised = {"quantised": True} if case.quantised else {}
    found["peft + liger"] = partial(_liger, **quantised)
    if case.method == "lora" and not case.head:
        found["unsloth's path"] = _unsloth_path
    if case.method in ("lora", "qlora"):
        found["unsloth"] = _unsloth
    return found


def _liger(problem: ModelProblem, quantised: bool = False) -> Contender:
    """PEFT on a model with Liger's norms, gated products and loss; its patches stay on this model."""
    import transformers.models.llama.modeling_llama as module
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

    if problem.case.device.type != "cuda":
        raise RuntimeError("its kernels are Triton's: they need a GPU")
    before = dict(module.__dict__)
    found = peft(problem, quantised=quantised)
    try:
        base: Any = found.module.get_base_model()  # type: ignore[operator]
        apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=problem.labels is not None, model=base)
    finally:
        module.__dict__.update(before)
    return found


def _unsloth(problem: ModelProblem) -> Contender:
    raise NotImplementedError("loads checkpoints by its own loader alone: linears.py runs its functions, here its path")


class UnslothPath(nn.Module):
    """`restated.LlamaLayer`, as many as the model has, and its last norm."""

    def __init__(self, model: Any, layers: Sequence[LlamaLayer]) -> None:
        super().__init__()
        self.layers, self.norm, self.rotary = nn.ModuleList(layers), model.norm, model.rotary_emb

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        cos, sin = (t[:, None] for t in self.rotary(inputs_embeds, positions))
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


def _unsloth_path(problem: ModelProblem) -> Contender:
    """Restated, see `restated.py`."""
    if problem.case.device.type == "cuda":
        compiled_pointwise()
    model: Any = problem.fresh()
    held: dict[Key, Any] = {k: nn.Parameter(t.to(problem.case.dtype)) for k, t in problem.theta.items()}
    layers: list[LlamaLayer] = []
    for number, layer in enumerate(model.layers):
        first = number * len(PROJECTIONS)
        own = [held[first + i, name] for i in range(len(PROJECTIONS)) for name in "AB"]
        layers.append(LlamaLayer(layer, own, SCALE))
    path = UnslothPath(model, layers)
    module = nn.ModuleList([model, path])
    return Contender(lambda x: [path(x)], module, held, lambda: [m.weight for m in layers_of(problem, model)])
