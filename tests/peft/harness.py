"""One adapter in HF PEFT and here, by way of its files: everything that can be compared is compared."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

import rewrite
from rewrite.peft import named_parameters
from tests.models import assert_close, assert_same, disturb
from tests.peft.models import batch, build

Tensor = torch.Tensor


def adapted(name: str, config: Any, dtype: torch.dtype, amount: float = 0.1) -> Any:
    """The model of that name under PEFT, every trained tensor away from where it starts."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(build(name, dtype), copy.deepcopy(config))
    for path, parameter in model.named_parameters():
        if "ranknum" in path:  # AdaLoRA's rank: PEFT leaves it trainable, and keeps it in no file
            parameter.requires_grad_(False)
    return disturb(model, amount).eval()


def quiet() -> warnings.catch_warnings:
    """PEFT warns of what it corrects by itself, and the tests make warnings errors."""
    return warnings.catch_warnings(action="ignore")


def loaded(theirs: Any, name: str, dtype: torch.dtype, folder: Path) -> nn.Module:
    """The same adapter read by us."""
    with quiet():
        theirs.save_pretrained(folder)
    return rewrite.load_peft(build(name, dtype), folder)


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(logits, loss) of one forward."""
    output = model(**inputs)
    if isinstance(output, Tensor):
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return output, (torch.tanh(output) * weights).sum()
    return output.logits, output.loss


def gradients_of_peft(model: Any) -> dict[str, Tensor]:
    """The gradients of a PEFT model under the names of its checkpoint."""
    held = model.named_parameters(remove_duplicate=False)  # a file has one of the names of what layers share
    found = {name: p.grad for name, p in held if p.grad is not None}
    with quiet():
        state = dict(peft.get_peft_model_state_dict(model, state_dict=model.state_dict() | found))
    known = {id(gradient) for gradient in found.values()}
    # With bias=all PEFT has the bias of a module that it trains in full twice, and what is tied under both names.
    kept = {n: value for n, value in state.items() if id(value) in known and ".modules_to_save." not in n}
    first = {id(value): n for n, value in reversed(kept.items())}
    return {n: value for n, value in kept.items() if first[id(value)] == n}


def step(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """One step of SGD on what is trained, and the logits after it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    model.zero_grad(set_to_none=True)
    return run(model, inputs)[0]


def check(
    name: str,
    config: Any,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    same_file: bool = True,
    merges: bool = True,
) -> None:
    """Logits, loss, gradients, input gradient, a step, the merged weights and the way back are equal to PEFT's."""
    theirs = adapted(name, config, dtype)
    ours = loaded(theirs, name, dtype, folder / "theirs").eval()
    found = []
    for model in (ours, theirs):
        inputs = batch(name, dtype)
        logits, loss = run(model, inputs)
        loss.backward()
        inside = {n: v.grad for n, v in inputs.items() if isinstance(v, Tensor) and v.grad is not None}
        found.append((logits, loss, inside))
    assert_close(found[0][0], found[1][0], tolerance, "logits")
    assert_close(found[0][1], found[1][1], tolerance, "loss")
    assert_same(found[0][2], found[1][2], tolerance)
    mine = {key: p.grad for key, p in named_parameters(ours)}
    expected = gradients_of_peft(theirs)
    check_gradients({k: g for k, g in mine.items() if g is not None}, expected, tolerance)
    check_way_back(ours, theirs, name, folder, dtype, tolerance, same_file)
    inputs = batch(name, dtype)
    assert_close(step(ours, inputs), step(theirs, inputs), tolerance, "after a step")
    if merges:
        check_merged(ours, theirs, tolerance)


def check_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Equal relative to their own size; one that vanishes, as of a key's bias, relative to the largest of the model."""
    assert sorted(ours) == sorted(theirs)
    assert all(bool(g.any()) for g in theirs.values())
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        error = float((ours[name] - expected).abs().max()) / scale
        assert error <= tolerance, f"gradient of {name}: {error:.2e}"


def check_way_back(
    ours: nn.Module, theirs: Any, name: str, folder: Path, dtype: torch.dtype, tolerance: float, same_file: bool = True
) -> None:
    """What we write has PEFT's keys and shapes, and PEFT reads it as the same function."""
    rewrite.save_peft(ours, folder / "ours")
    files = [load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    if same_file:
        assert {k: (t.shape, t.dtype) for k, t in files[0].items()} == {
            k: (t.shape, t.dtype) for k, t in files[1].items()
        }
    with quiet():
        again = peft.PeftModel.from_pretrained(build(name, dtype), str(folder / "ours")).eval()
    inputs = batch(name, dtype)
    assert_close(run(again, inputs)[0], run(theirs, inputs)[0], tolerance, "read by PEFT again")
    twice = rewrite.load_peft(build(name, dtype), folder / "ours").eval()
    assert_close(run(twice, inputs)[0], run(ours, inputs)[0], tolerance, "read by us again")


def check_merged(ours: nn.Module, theirs: Any, tolerance: float) -> None:
    """Merging gives the same weights, relative to their size or to 1 where that is less."""
    with quiet():
        merged = dict(theirs.merge_and_unload().named_parameters())
    rewrite.merge(ours)
    mine = dict(ours.named_parameters())
    assert sorted(mine) == sorted(merged)
    for name, expected in merged.items():
        error = float((mine[name] - expected).detach().abs().max()) / max(1e-2, float(expected.detach().abs().max()))
        assert error <= tolerance, f"merged {name}: {error:.2e}"
