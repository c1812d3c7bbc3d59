"""Does every method learn?  Held-out loss on the built-in model and text after the same number of steps.

    python benchmarks/held_out.py                          # prints the table
    python benchmarks/held_out.py --out docs/benchmarks    # writes held_out.md, held_out.json and held_out.png

Every method starts from the same pre-trained model, sees the same batches in the same order and is trained as it is
written, in eager, with AdamW (SGD where gradients are estimated from losses).  Each rate of `RATES` is tried, the best
one stands in the table: it shows that a method learns, it is no ranking of methods.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rewrite
from rewrite.finetune import bases
from rewrite.finetune.request import Job, prepare
from rewrite.finetune.training import evaluate, train

LORA = "lora(r=8)@linear-head"
SPECS = (
    LORA,
    "lora(r=8)@attn.q,v",
    "full(linear,norm,embed,head)",
    "s2ft(heads=1, channels=32)",
    "s2ft(heads=1, channels=32, by=weight)",
    "neuroada(k=1)@linear-head",
    "shira(r=8)@linear-head",
    "spiel@linear-head",
    "lift@linear-head",
    "sara@linear-head",
    "ladder(reduction=4)@blocks",
    "qst(reduction=4, r=8)@blocks + nf4(base)",
    "qst(reduction=4, down=pool)@blocks",
    "unipt(reduction=4)@blocks",
    "sherl(reduction=4)@blocks",
    "lisa(active=2, every=10)@blocks",
    f"{LORA} + ist(active=2, every=10)@blocks",
    "green(rho=0.6)",
    "fused_update",
    f"{LORA} + save(fp8)",
    f"{LORA} + save(int8)",
    f"{LORA} + ~save(int4)",
    f"{LORA} + recompute@ffn",
    f"{LORA} + budget(0.5)",
    f"{LORA} + mezo(eps=1e-2)",
    "mezo(eps=1e-3)",
)
RATES, ZEROTH = (3e-3, 1e-2, 3e-2), (1e-3, 1e-2, 1e-1)
"""Rates of AdamW, and of SGD on gradients that are estimated from losses."""


@dataclass(frozen=True)
class Row:
    """One method: its best rate, what it trains, its loss on held-out text, and the seconds that all rates took."""

    spec: str
    rate: float
    trainable: int
    loss: float
    seconds: float


def measure(base: bases.Base, blocks: Any, spec: str, args: argparse.Namespace) -> Row:
    """The best of all rates, each from a fresh copy of the base."""
    begin, best = time.perf_counter(), (float("inf"), 0.0, 0)
    zeroth = "mezo" in spec
    for lr in args.zeroth if zeroth else args.rates:
        model = copy.deepcopy(base.model)
        torch.manual_seed(args.seed)
        rewrite.attach(model, spec)
        optimizer = rewrite.optimizer(model, torch.optim.SGD if zeroth else torch.optim.AdamW, lr=lr)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        try:
            train(model, blocks.train, optimizer, steps=args.steps, batch=args.batch, seed=args.seed, progress=spec)
        except rewrite.RewriteError:  # the loss is no number any more: the rate was too large
            continue
        best = min(best, (evaluate(model, blocks.held, args.batch, "held out"), lr, trainable))
    return Row(spec, best[1], best[2], best[0], time.perf_counter() - begin)


def lines(rows: list[Row], before: float) -> list[str]:
    """The table; LoRA stands in the first row."""
    found = [("spec", "trained", "lr", "held-out loss", "beside LoRA")]
    found += [
        (f"`{r.spec}`", f"{r.trainable:,}", f"{r.rate:g}", f"{r.loss:.3f}", f"{r.loss - rows[0].loss:+.3f}")
        for r in rows
    ]
    found.append(("(the base)", "0", "", f"{before:.3f}", f"{before - rows[0].loss:+.3f}"))
    return ["| " + " | ".join(r) + " |" for r in (found[0], ["---"] * 5, *found[1:])]


def page(text: str, args: argparse.Namespace) -> str:
    """The table with what it shows."""
    rates, zeroth = (", ".join(f"{rate:g}" for rate in given) for given in (args.rates, args.zeroth))
    return f"""# Does every method learn?

`python benchmarks/held_out.py`, torch {torch.__version__}: the built-in model after {args.pretrain_steps} steps of
pre-training, then {args.steps} steps of {args.batch} x 64 tokens with each method, as it is, in eager. Loss on held-out
text in nats a byte; the best of the rates {rates}, for `mezo` of {zeroth}.
It shows that a method learns, it is no ranking: a few steps favour methods that train much, and each has rates of its
own. `mezo` needs many more steps than methods with gradients. `vqt` is not here: it is for models whose tokens see one
another, and refuses this causal one.

{text}

![nats below the base](held_out.png)
"""


def picture(rows: list[Row], before: float, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(rows, key=lambda r: r.loss)
    axes.barh(range(len(rows)), [before - r.loss for r in ordered], color="#3d6da8")
    axes.axvline(before - rows[0].loss, color="#b3590b", linewidth=1)
    axes.set_yticks(range(len(rows)), [r.spec for r in ordered], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=f"nats below the base, {before:.3f}; the line is LoRA")
    axes.spines[["right", "top"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss of every method after the same number of steps.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pretrain-steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--zeroth", type=float, nargs="+", default=ZEROTH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as unused:
        blocks = prepare(Job(out=unused, spec=LORA, batch=args.batch, length=64)).blocks
    base, _ = bases.pretrain(args.pretrain_steps, args.seed, "cpu")
    before = evaluate(base.model, blocks.held, args.batch, "base")
    rows: list[Row] = []
    for spec in dict.fromkeys((LORA, *args.specs)):
        rows.append(measure(base, blocks, spec, args))
        print(f"{rows[-1].loss:.3f}  {rows[-1].rate:g}  {spec}  ({rows[-1].seconds:.0f} s)", flush=True)
    text = "\n".join(lines(rows, before))
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, "python": platform.python_version(), "args": vars(args) | {"out": ""}}
        data = {"about": about, "before": before, "rows": [asdict(r) for r in rows]}
        (args.out / "held_out.json").write_text(json.dumps(data, indent=2) + "\n")
        (args.out / "held_out.md").write_text(page(text, args))
        picture(rows, before, args.out / "held_out.png")


if __name__ == "__main__":
    main()
