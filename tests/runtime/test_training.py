"""What happens around a training loop: schedules, regularisers, groups, starts from data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from tests.models import assert_close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 14), nn.Linear(14, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def build() -> Net:
    torch.manual_seed(3)
    return Net().double()


def batch(number: int = 0) -> torch.Tensor:
    return torch.randn(6, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(number)) + 0.3


def entries(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith(".E")])


def train(model: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(rewrite.parameter_groups(model, lr=0.05))
    for number in range(steps):
        (model(batch(number)).square().mean() + rewrite.regulariser(model)).backward()
        optimizer.step()
        assert rewrite.step(model, optimizer) == number + 1
        optimizer.zero_grad()
    return optimizer


def test_adalora_ends_with_its_budget():
    model = rewrite.attach(build(), "adalora(r=4, target=2, steps=20, warmup=4, final=5)@linear")
    train(model, 4)
    assert int((entries(model) != 0).sum()) == 8
    model = rewrite.attach(build(), "adalora(r=4, target=2, steps=20, warmup=4, final=5)@linear")
    optimizer = train(model, 20)
    assert int((entries(model) != 0).sum()) == 4
    for name, p in model.named_parameters():
        if name.endswith(".E"):
            assert not optimizer.state[p]["exp_avg"][p == 0].any()


def test_the_least_important_entries_rest():
    model = rewrite.attach(build(), "adalora(r=3, target=1, steps=4, beta1=0.001, beta2=0.001)@linear")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adalora." in name:
                p.fill_(1.0)
                p.grad = torch.ones_like(p)
        kept = model.get_parameter("second.adapters.adalora.E")
        kept.grad[1] = 5.0  # type: ignore[index]
        rewrite.step(model)  # the mean is taken nearly as it is: all spreads are tiny, but larger for what is larger
        rewrite.step(model)
        rewrite.step(model)
    assert kept[1] == 1
    assert int((entries(model) == 0).sum()) >= 3


def test_the_regulariser_is_the_distance_from_orthonormal():
    model = rewrite.attach(build(), "adalora(r=3, orthogonal=0.5)@linear")
    terms = []
    for layer in (model.first, model.second):
        A, B, one = layer.adapters.adalora.A, layer.adapters.adalora.B, torch.eye(3, dtype=torch.float64)
        terms.append(0.25 * ((A @ A.T - one).norm() + (B.T @ B - one).norm()))
    assert_close(rewrite.regulariser(model), torch.stack(terms).mean())
    plain = rewrite.attach(build(), "lora@linear")
    assert rewrite.regulariser(plain) == 0
    assert rewrite.step(plain) == 1


def test_groups_follow_the_method():
    model = rewrite.attach(build(), "lora(r=2, plus=16)@linear")
    groups = {g["lr"]: g for g in rewrite.parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    assert set(groups) == {1e-3, 16e-3}
    assert [p.shape for p in groups[1e-3]["params"]] == [(2, 9), (2, 14)]
    assert all(g["weight_decay"] == 0.1 for g in groups.values())
    with pytest.raises(rewrite.RewriteError, match="no adapter 'en'"):
        rewrite.parameter_groups(model, lr=1e-3, adapter="en")


@pytest.mark.parametrize("init", ["eva", "corda", "corda(mode=kpm)", "lora_ga"])
def test_starts_from_data_change_nothing_at_first(init):
    model, base = rewrite.attach(build(), f"lora(r=2, init={init}, alpha=3)@linear"), build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    kwargs = {"loss": lambda y: y.square().sum()} if init == "lora_ga" else {}
    assert rewrite.calibrate(model, [batch(0), (batch(1),), {"x": batch(2)}], **kwargs) is model
    assert model.training
    assert_close(model(batch(7)), base(batch(7)), 1e-9)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.rpartition(".")[2] for n in changed} >= {"A"}
    assert all(p.grad is None for p in model.parameters())


def test_eva_takes_the_principal_directions():
    model = rewrite.calibrate(rewrite.attach(build(), 'lora(r=3, init=eva)@"first"'), [batch(0), batch(1)])
    rows = torch.cat([batch(0), batch(1)]).flatten(0, 1)
    wanted = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3]
    A = model.first.adapters.lora.A
    assert_close((A @ wanted.T).abs(), torch.eye(3, dtype=torch.float64), 1e-9)


def test_corda_is_the_svd_in_the_metric_of_the_inputs():
    model = rewrite.calibrate(rewrite.attach(build(), 'lora(r=3, init=corda, alpha=6)@"second"'), [batch(0)])
    base = build()
    x = torch.tanh(base.first(batch(0))).flatten(0, 1)
    C = x.T @ x / len(x)
    C = C + torch.eye(14, dtype=C.dtype) * C.diagonal().mean() * 0.01
    U, S, Vh = torch.linalg.svd(base.second.weight @ C, full_matrices=False)
    wanted = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3] @ torch.linalg.inv(C)
    held = model.second.adapters.lora
    assert_close(held.B @ held.A * 2, wanted, 1e-9)


def test_lora_ga_goes_along_the_gradient():
    model = rewrite.attach(build(), 'lora(r=2, init=lora_ga)@"first"')
    rewrite.calibrate(model, [batch(0)], loss=lambda y: y.square().sum())
    base = build()
    base(batch(0)).square().sum().backward()
    U, _, Vh = torch.linalg.svd(base.first.weight.grad, full_matrices=False)
    held, factor = model.first.adapters.lora, 14**0.25 / 4
    assert_close((held.A @ Vh[:2].T).abs(), torch.eye(2, dtype=torch.float64) * factor, 1e-9)
    assert_close((held.B.T @ U[:, 2:4]).abs(), torch.eye(2, dtype=torch.float64) * factor, 1e-9)


def test_loftq_brings_a_rounded_base_nearer():
    spec = 'lora(r=3, init={})@"first" + nf4("first")'
    exact = build().first.weight
    found = [rewrite.merge(rewrite.attach(build(), spec.format(init))).first.weight for init in ("kaiming", "loftq")]
    lost = [torch.linalg.svdvals(exact - weight) for weight in found]
    assert_close(lost[1][:-3], lost[0][3:], 1e-9)  # the three largest are gone, the rest is as it was
    with pytest.raises(rewrite.ResolveError, match=r"lora does not fit first: .* is not rounded"):
        rewrite.attach(build(), 'lora(r=3, init=loftq)@"first"')


def test_calibrate_says_what_it_lacks():
    with pytest.raises(rewrite.RewriteError, match="nothing in this model starts from data"):
        rewrite.calibrate(rewrite.attach(build(), "lora@linear"), [batch()])
    model = rewrite.attach(build(), "lora(r=2, init=eva)@linear")
    with pytest.raises(rewrite.RewriteError, match="no batch reached first"):
        rewrite.calibrate(model, [])
    with pytest.raises(rewrite.RewriteError, match="need a loss"):
        rewrite.calibrate(rewrite.attach(build(), "lora(r=2, init=lora_ga)@linear"), [batch()])
    start = model.first.adapters.lora.A.clone()
    with pytest.raises(RuntimeError):
        rewrite.calibrate(model, [batch(), torch.zeros(2, 3)])
    assert torch.equal(model.first.adapters.lora.A, start)
    assert model.training
    assert not model.first._forward_hooks or len(model.first._forward_hooks) == 1


def test_the_trainer_drives_both(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            y = self.net(x)
            return {"loss": y.square().mean(), "logits": y}

    torch.manual_seed(3)
    model = rewrite.attach(Model(), "adalora(r=4, target=1, steps=6)@linear")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, learning_rate=0.05, disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    data = [{"x": torch.randn(4, 9), "labels": torch.zeros(1)} for _ in range(16)]
    transformers.Trainer(model, args, train_dataset=data, callbacks=[rewrite.trainer_callback()]).train()
    assert rewrite.step(model) == 7
    assert int((entries(model) != 0).sum()) <= 3
