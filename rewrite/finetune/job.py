"""finetune: from a base model, text and a spec to an adapter on disk that is measured and checked.

Everything that can be wrong with the request is found before training begins (`rewrite.finetune.request`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewrite
from rewrite.codegen.files import write
from rewrite.errors import RewriteError
from rewrite.finetune import bases, checks
from rewrite.finetune.bases import Base
from rewrite.finetune.checks import Check
from rewrite.finetune.request import Job, Request, prepare
from rewrite.finetune.training import Curve, evaluate, train
from rewrite.runtime.attach import require
from rewrite.runtime.merge import merge_report
from rewrite.runtime.regimes import trained
from rewrite.runtime.training import gradient_of
from rewrite.table import duration, share, table

Say = Callable[[str], None]
_RATES = {(False, True): 1e-2, (False, False): 2e-4, (True, True): 1e-3, (True, False): 1e-6}
"""Learning rates by whether gradients are estimated (`mezo`) and whether the model is the built-in one."""


@dataclass
class Result:
    """What came out: losses in nats per token on held-out text, seconds, counts of parameters, and the checks."""

    spec: str
    base_loss: float
    loss: float
    trainable: int
    parameters: int
    step_seconds: float
    first_step_seconds: float
    losses: list[float]
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every form of the model computed the same function."""
        return all(check.holds for check in self.checks)


def finetune(job: Job, say: Say = print) -> Result:
    """Do the job and `say` each result as soon as it is known.

    Writes the adapter (`adapter.safetensors`, `rewrite.json`), `diff.html` and `result.json` to `job.out`.
    Raises `rewrite.Error`, before any training, where the request cannot be met.

    Example: `finetune(Job(out="adapter", model="llama/", data="notes/", spec="lora(r=16)@linear-head"))`
    """
    start = time.perf_counter()
    request = prepare(job)
    base = _base(job, say)
    say("\n".join([f"base     {base.about}", *request.lines, ""]))
    held, model = request.blocks.held, base.model
    base_loss = evaluate(model, held, job.batch, "base")
    before = checks.logits(model, held, job.batch, compiled=False)
    torch.manual_seed(job.seed)
    parameters = sum(p.numel() for p in model.parameters())
    rewrite.compile(model, job.spec, backend=job.backend, dynamic=False)
    if gradient_of(model) == "fused":
        say("note     fused_update applies gradients before their norm is known: they are not clipped\n")
    curve = _adapt(job, request, model)
    result = Result(
        spec=request.spec,
        base_loss=base_loss,
        loss=evaluate(model, held, job.batch, "adapted"),
        trainable=sum(t.parameter.numel() for t in trained(model, require(model).grafts)),
        parameters=parameters,
        step_seconds=curve.step,
        first_step_seconds=curve.seconds[0],
        losses=curve.losses,
    )
    say(_summary(result, job.steps))
    say(f"\n{rewrite.report(model)}\n")
    rewrite.save(model, job.out)
    result.checks = _checks(job, base, held, before, say)
    rewrite.diff(model).to_html(Path(job.out, "diff.html"))
    _write(Path(job.out, "result.json"), {"job": asdict(job), **asdict(result)})
    say(f"wrote    adapter.safetensors, rewrite.json, result.json, and diff.html to look at, in {Path(job.out)}/")
    say(f"took     {duration(time.perf_counter() - start)}")
    return result


def _base(job: Job, say: Say) -> Base:
    if job.model is not None:
        return bases.load(job.model, job.device)
    base, curve = bases.pretrain(job.pretrain_steps, job.seed, job.device)
    say(f"pre-trained for {job.pretrain_steps} steps in {duration(sum(curve.seconds))}: loss {curve.losses[-1]:.3f}")
    if job.save_base:
        bases.save(base, job.save_base)
        say(f"saved    the base model to {job.save_base}: use it again with --model {job.save_base}")
    return base


def _adapt(job: Job, request: Request, model: nn.Module) -> Curve:
    zeroth, built_in = gradient_of(model) == "zeroth", job.model is None
    lr = job.learning_rate or _RATES[zeroth, built_in]
    if zeroth:  # the rule of the paper
        optimizer = rewrite.optimizer(model, torch.optim.SGD, lr=lr)
    else:
        optimizer = rewrite.optimizer(model, torch.optim.AdamW, lr=lr, fused=True)
    return train(
        model, request.blocks.train, optimizer, steps=job.steps, batch=job.batch, seed=job.seed, progress="adapt"
    )


def _summary(result: Result, steps: int) -> str:
    rows = [("held-out text", "loss", "perplexity")]
    losses = {"base": result.base_loss, "adapted": result.loss}
    rows += [(name, f"{loss:.4f}", f"{math.exp(min(loss, 700)):.3f}") for name, loss in losses.items()]
    lines = table(rows, right={1, 2})
    lines.append("")
    part = share(result.trainable, result.parameters)
    lines.append(f"trained  {result.trainable:,} parameters, {part} of {result.parameters:,}")
    first = duration(result.first_step_seconds)
    lines.append(f"step     {duration(result.step_seconds)}, median of {steps}; the first, with compilation, {first}")
    return "\n".join(lines)


def _checks(job: Job, base: Base, rows: torch.Tensor, before: torch.Tensor, say: Say) -> list[Check]:
    """Is the adapter on disk, loaded or merged, the model that was trained; is the compiled one the eager one?"""
    model, fresh = base.model, base.fresh()
    limit = checks.allowed(fresh)
    adapted = checks.logits(model, rows, job.batch, compiled=False)
    compiled = checks.logits(model, rows, job.batch, compiled=True)
    loaded = checks.logits(rewrite.load(fresh, job.out), rows, job.batch, compiled=False)
    found = [
        Check("saved and loaded on a fresh base", checks.difference(loaded, adapted), limit),
        Check(f"compiled ({job.backend})", checks.difference(compiled, adapted), limit),
    ]
    try:
        merged = checks.logits(rewrite.merge(fresh), rows, job.batch, compiled=False)
        found.insert(1, Check("merged into a plain model", checks.difference(merged, adapted), limit))
        note = str(merge_report(fresh))
    except RewriteError as error:  # methods that do not merge say so
        note = f"not merged: {error}"
    say(checks.listed(found, moved=checks.difference(adapted, before)))
    say(f"{note}\n")
    return found


def _write(file: Path, data: dict[str, Any]) -> None:
    try:
        write(file, (json.dumps(data, indent=2) + "\n").encode())
    except OSError as error:
        raise RewriteError(f"cannot write {file}: {error.strerror or error}") from error
