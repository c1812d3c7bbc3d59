"""The loop: linear warm-up and cosine decay, gradient clipping, what a spec asks for; and the loss on held-out blocks.

It trains whatever its optimizer holds, adapted or not.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rewrite.errors import RewriteError
from rewrite.finetune.corpus import batches, spread
from rewrite.progress import ticking
from rewrite.runtime.attach import attachment
from rewrite.runtime.training import regulariser, step

_WARM_UP = 0.05  # share of the steps
_FLOOR = 0.02  # of the learning rate at the end
_CLIP = 1.0  # norm of all gradients together


@dataclass
class Curve:
    """How a training went: the loss and the seconds of every step; the first step includes compilation."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        """Median seconds of a step, the first one left out where there are more."""
        return statistics.median(self.seconds[1:] or self.seconds)


def train(
    model: nn.Module,
    blocks: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
    seed: int,
    progress: str,
) -> Curve:
    """Train what `optimizer` holds on `blocks` (count, length), in place.

    Gradients that are applied in the backward pass are not clipped, and where there are none nothing is.  Raises
    `RewriteError` when the loss is no longer a number.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    trained, curve = [p for group in optimizer.param_groups for p in group["params"]], Curve()
    device, adapted = trained[0].device, attachment(model) is not None
    model.train()
    bar = tqdm(batches(blocks, batch, steps, seed), desc=progress, total=steps, unit="step", delay=2)
    for rows in bar:
        start = time.perf_counter()
        # The first step may compile for half a minute: the bar shows that time passes.
        ids = rows.to(device)

        def closure(ids: torch.Tensor = ids) -> Any:
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            if loss.requires_grad:
                (loss + regulariser(model) if adapted else loss).backward()
                nn.utils.clip_grad_norm_(trained, _CLIP)
            return loss.detach()

        with contextlib.nullcontext() if curve.losses else ticking(bar):
            loss: Any = optimizer.step(closure)
        if adapted:
            step(model, optimizer, loss=closure)
        schedule.step()
        curve.losses.append(loss.item())
        curve.seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{curve.losses[-1]:.3f}", refresh=False)
        if not math.isfinite(curve.losses[-1]):
            raise RewriteError(f"the loss is {curve.losses[-1]} at step {len(curve.losses)}: try a smaller --lr")
    return curve


def rate(step: int, steps: int) -> float:
    """The factor of the learning rate at a step: up in a line, then down a cosine.

    >>> [round(rate(step, 100), 3) for step in (0, 4, 50, 99)]
    [0.2, 1.0, 0.55, 0.02]
    """
    warm = max(1, math.ceil(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, held: torch.Tensor, batch: int, progress: str, limit: int = 64) -> float:
    """Mean loss per token, in nats, over at most `limit` of the held-out blocks, evenly spread.

    Every batch has the same shape: a short one is filled up with rows that do not count.
    """
    device = next(model.parameters()).device
    rows = held[list(spread(len(held), min(limit, len(held))))]
    model.eval()
    total = 0.0
    for part in tqdm(rows.split(batch), desc=progress, unit="batch", delay=2, leave=False):
        total += model(**filled(part.to(device), batch)).loss.item() * len(part)
    return total / len(rows)


def filled(rows: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of exactly `batch` rows, so that no new shape is compiled; rows that are added have no label."""
    ids = torch.cat([rows, rows[:1].expand(max(0, batch - len(rows)), -1)])[:batch]
    labels = ids.clone()
    labels[len(rows) :] = -100
    return {"input_ids": ids, "labels": labels}
