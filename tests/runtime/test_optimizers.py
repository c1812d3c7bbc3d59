"""Optimizers as a spec asks for them: `mezo`, `fused_update`, and the ordinary one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

import rewrite
from rewrite.runtime import optimizers
from rewrite.runtime.attach import require
from tests.models import assert_close, changed, frozen
from tests.runtime.test_regimes import active, build, loss

CLASSES = [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.NAdam, {}),
]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batches: int = 9) -> list[float]:
    found = []
    for number in (n % batches for n in range(steps)):

        def closure(number: int = number) -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(model, number)
            if value.requires_grad:
                value.backward()
            return value

        found.append(float(optimizer.step(closure).detach()))  # type: ignore[union-attr]
        rewrite.step(model, optimizer)
    return found


def seeded(spec: str) -> nn.Module:
    model = build()
    torch.manual_seed(5)
    return rewrite.attach(model, spec)


@pytest.mark.parametrize("base", ["full(linear,embed)", "lora(r=2, plus=4)@linear", "lisa(active=2, every=2)"])
@pytest.mark.parametrize(("cls", "settings"), CLASSES, ids=lambda v: getattr(v, "__name__", ""))
def test_fused_is_the_ordinary_step(cls, settings, base):
    ordinary, fused = seeded(base), seeded(f"{base} + fused_update")
    plain = rewrite.optimizer(ordinary, cls, lr=0.01, weight_decay=0.1, **settings)
    made = rewrite.optimizer(fused, cls, lr=0.01, weight_decay=0.1, **settings)
    assert type(plain) is cls
    assert isinstance(made, cls)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)) for o in (plain, made)]
    for _ in range(2):
        assert train(ordinary, plain, 3) == train(fused, made, 3)
        for schedule in schedules:
            schedule.step()
    assert not changed(frozen(ordinary), frozen(fused))
    assert all(p.grad is None for p in fused.parameters())
    assert len(plain.state) == len(made.state) > 0
    assert str(plain.state_dict()["param_groups"]) == str(made.state_dict()["param_groups"])


def test_fused_holds_one_gradient_at_a_time(monkeypatch):
    model = rewrite.attach(build(), "fused_update")
    rewrite.optimizer(model, torch.optim.SGD, lr=0.1)
    held, update = [], optimizers.Fused.update

    def watched(self: optimizers.Fused, parameter: torch.Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))
        update(self, parameter)

    monkeypatch.setattr(optimizers.Fused, "update", watched)
    loss(model).backward()
    assert held == [1] * len(list(model.parameters()))


def test_fused_state_is_saved_and_loaded():
    straight, resumed = seeded("fused_update"), seeded("fused_update")
    one = rewrite.optimizer(straight, torch.optim.AdamW, lr=0.01)
    two = rewrite.optimizer(resumed, torch.optim.AdamW, lr=0.01)
    train(straight, one, 2)
    train(resumed, two, 2)
    again = rewrite.optimizer(resumed, torch.optim.AdamW, lr=0.5)
    again.load_state_dict(copy.deepcopy(two.state_dict()))
    assert train(straight, one, 3) == train(resumed, again, 3)
    plain = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    plain.load_state_dict(again.state_dict())  # it is a state of AdamW like any other


def test_fused_refuses_to_accumulate():
    model = rewrite.attach(build(), "fused_update")
    optimizer = rewrite.optimizer(model, torch.optim.SGD, lr=0.1)
    loss(model).backward()
    with pytest.raises(rewrite.RewriteError, match="gradients cannot be accumulated"):
        loss(model).backward()
    optimizer.step()
    loss(model).backward()


def test_hooks_go_with_the_adapters_and_with_the_next_optimizer():
    model, base = rewrite.attach(build(), "fused_update"), build()
    rewrite.optimizer(model, torch.optim.SGD, lr=0.1)
    rewrite.optimizer(model, torch.optim.SGD, lr=0.1)
    loss(copy.deepcopy(model)).backward()
    loss(model).backward()  # one update, not two
    rewrite.remove(model)
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not changed(frozen(model), frozen(base))


@pytest.mark.parametrize("spec", ["fused_update", "mezo"])
def test_a_rule_that_asks_for_more_losses_is_refused(spec):
    with pytest.raises(rewrite.RewriteError, match="LBFGS evaluates the loss as often as it likes"):
        rewrite.optimizer(rewrite.attach(build(), spec), torch.optim.LBFGS, lr=0.1)


def direction(model: nn.Module, made: optimizers.ZerothOrder, seed: int) -> dict[str, torch.Tensor]:
    """z of a seed, tensor by tensor."""
    stream = torch.Generator().manual_seed(seed)
    z = {id(p): torch.zeros_like(p) for p in made.working()}
    for p in made.working():
        optimizers.perturb(z[id(p)], 1.0, stream)
    return {n: z[id(p)] for n, p in model.named_parameters() if id(p) in z}


def slope(model: nn.Module, z: dict[str, torch.Tensor]) -> torch.Tensor:
    """The exact derivative of the loss along z."""
    theta = {n: p.detach() for n, p in model.named_parameters()}
    full = {n: z.get(n, torch.zeros_like(t)) for n, t in theta.items()}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            return loss(self.model)

    def value(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(Wrapped(), {f"model.{n}": t for n, t in given.items()}, ())

    return jvp(value, (theta,), (full,))[1]


@pytest.mark.parametrize("spec", ["mezo(eps={})", "lora(r=2)@linear + mezo(eps={})"])
def test_mezo_estimates_the_slope_along_its_direction(spec):
    errors = []
    for eps in (2e-2, 1e-2):
        model = seeded(spec.format(eps))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    p.fill_(0.3)
        made = rewrite.optimizer(model, torch.optim.SGD, lr=0.0)
        before = copy.deepcopy(model)
        train(model, made, 1)
        ((seed, projected),) = made.estimates  # type: ignore[attr-defined]
        exact = float(slope(before, direction(model, made, seed)))  # type: ignore[arg-type]
        errors.append(abs(projected - exact) / abs(exact))
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)  # of the order of eps squared


def test_mezo_takes_the_step_of_the_paper():
    model = seeded("mezo(eps=1e-3, q=3)")
    before = frozen(model)
    made = rewrite.optimizer(model, torch.optim.SGD, lr=0.02, weight_decay=0.1)
    train(model, made, 1)
    assert len({seed for seed, _ in made.estimates}) == 3  # type: ignore[attr-defined]
    for name, p in model.named_parameters():
        g = sum(rho * direction(model, made, seed)[name] / 3 for seed, rho in made.estimates)  # type: ignore
        assert_close(p.detach(), before[name] - 0.02 * (g + 0.1 * before[name]), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mezo_goes_back_to_where_it_was(dtype):
    model = rewrite.attach(build().to(dtype), "mezo(eps=1e-3)")
    before = frozen(model)
    made = rewrite.optimizer(model, torch.optim.SGD, lr=0.0)
    train(model, made, 1)
    away = 6e-3  # the largest entry of 2 eps z is below that
    for name, p in model.named_parameters():
        rounding = (before[name].abs() + away) * torch.finfo(dtype).eps
        assert ((p - before[name]).abs() <= 3 * rounding / 2).all()  # three additions, half a unit each
    with pytest.raises(ZeroDivisionError):
        made.step(lambda: 1 / 0)
    assert_close(model.head.weight.detach().double(), before["head.weight"].double(), 4 * torch.finfo(dtype).eps)


def test_mezo_builds_no_graph_and_keeps_nothing():
    model = rewrite.attach(build(), "lora(r=2, dropout=0.5)@linear + mezo").train()
    made = rewrite.optimizer(model, torch.optim.SGD, lr=0.01)
    packed, modes = [], []

    def closure() -> torch.Tensor:
        modes.append(model.training)
        value = loss(model)
        assert not value.requires_grad
        return value

    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t), lambda t: t):
        made.step(closure)
    assert not packed
    assert modes == [False, False]  # no dropout
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(rewrite.RewriteError, match="mezo has no gradients"):
        made.step()


def test_mezo_follows_its_seed_and_its_state():
    one, two = seeded("mezo"), seeded("mezo")
    torch.manual_seed(1)
    first = rewrite.optimizer(one, torch.optim.SGD, lr=1e-3)
    torch.manual_seed(1)
    second = rewrite.optimizer(two, torch.optim.SGD, lr=1e-3)
    assert train(one, first, 4) == train(two, second, 4)
    third = rewrite.optimizer(two, torch.optim.SGD, lr=1.0)
    third.load_state_dict(second.state_dict())
    assert train(one, first, 3) == train(two, third, 3)
    assert not changed(frozen(one), frozen(two))


@pytest.mark.parametrize("spec", ["mezo(q=4)", "lora(r=4)@linear + mezo(eps=1e-2, q=4)", "mezo(q=4) + lisa(active=1)"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_mezo_learns_compiled_as_in_eager(spec, cls):
    found = []
    for compiled in (False, True):
        model = build()
        torch.manual_seed(5)
        made = rewrite.compile(model, spec, backend="aot_eager") if compiled else rewrite.attach(model, spec)
        optimizer = rewrite.optimizer(made, cls, lr=1e-2)
        found.append(train(made, optimizer, 40, batches=1))
        assert require(made).calls.eager == 0
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert sum(found[0][-5:]) < 0.9 * sum(found[0][:5])


def test_mezo_moves_only_what_works():
    model = seeded("mezo + lisa(active=1, every=2)")
    optimizer = rewrite.optimizer(model, torch.optim.SGD, lr=1e-3)
    before, (now,) = frozen(model), active(model)  # type: ignore[arg-type]
    train(model, optimizer, 1)
    assert {n.split(".")[1] for n in changed(before, frozen(model)) if "layers" in n} == {str(now)}


def test_pieces_and_strides_do_not_matter(monkeypatch):
    def noise(tensor: torch.Tensor) -> torch.Tensor:
        optimizers.perturb(tensor, 2.0, torch.Generator().manual_seed(4))
        return tensor

    monkeypatch.setattr(optimizers, "PIECE", 32)
    whole = noise(torch.zeros(9, 11))
    assert torch.equal(noise(torch.zeros(11, 9).t().contiguous().t()).t().contiguous().view(9, 11), whole)
    assert 1.5 < float(noise(torch.zeros(9, 44)[:, ::4]).std()) < 2.5


class Wrapped(nn.Module):
    """As the Hugging Face `Trainer` wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.net(x)
        return {"loss": y.square().mean(), "logits": y}


def trainer(model: nn.Module, folder: str, optimizer: torch.optim.Optimizer | None, **changes: object):
    transformers = pytest.importorskip("transformers")
    settings = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 0.05, "label_names": ["labels"]}
    settings |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0}
    args = transformers.TrainingArguments(output_dir=folder, **{**settings, **changes})
    data = [{"x": torch.randint(0, 11, (4,)), "labels": torch.zeros(1)} for _ in range(16)]
    given = {} if optimizer is None else {"optimizers": (optimizer, None)}
    return transformers.Trainer(model, args, train_dataset=data, callbacks=[rewrite.trainer_callback()], **given)


@pytest.mark.parametrize("spec", ["lisa(active=1, every=1)", "fused_update", "lora@linear + ist(active=1, every=2)"])
def test_the_trainer_takes_its_optimizer(tmp_path, spec):
    model = rewrite.attach(Wrapped(), spec)
    before = frozen(model)
    trainer(model, str(tmp_path), rewrite.optimizer(model, torch.optim.AdamW, lr=0.05)).train()
    assert changed(before, frozen(model))
    assert require(model).steps == 5


@pytest.mark.parametrize(
    ("spec", "mine", "changes", "message"),
    [
        ("mezo", True, {}, "it runs a backward pass, and mezo has none"),
        ("lisa(active=1)", False, {}, "its own optimizer holds what trains now"),
        ("fused_update", False, {}, "its own optimizer holds what trains now"),
        ("fused_update", True, {"max_grad_norm": 1.0}, "max_grad_norm=0"),
        ("fused_update", True, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
    ],
)
def test_the_trainer_refuses_what_it_cannot_do(tmp_path, spec, mine, changes, message):
    model = rewrite.attach(Wrapped(), spec)
    before = frozen(model)
    made = rewrite.optimizer(model, torch.optim.SGD, lr=0.05) if mine else None
    with pytest.raises(rewrite.RewriteError, match=message):
        trainer(model, str(tmp_path), made, **changes).train()
    assert not changed(before, frozen(model))
