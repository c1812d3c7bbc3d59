"""Training steps of a small model, interleaved in one process: rewrite, HF PEFT eager, HF PEFT + torch.compile.

    python benchmarks/train_step.py                                # LoRA: ratios pair by pair with their spread
    python benchmarks/train_step.py --methods lora dropout dora    # all in one run
    python benchmarks/train_step.py --json out.json --rounds 40 --optimizer

Every round runs each contender once, in an order that rotates; a ratio compares two runs of one round, so that a
disturbance of the machine hits both.  The same weights and the same batch, forward + backward, and AdamW if asked for.
`frozen base` is the compiled base with only its embedding trained: the floor of any method that sends a gradient
through all layers.  Ratios are for the machine they ran on; nothing here is an absolute claim.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import OURS, Plan, Step, about, headline, measure, ratios, settings, write
from transformers import LlamaConfig, LlamaForCausalLM

import rewrite

FLOOR = "frozen base"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """The base model, the same for every contender."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        vocab_size=args.vocab,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).train()


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora(r={rank})", {}),
    "dropout": ("lora(r={rank}, dropout=0.05)", {"lora_dropout": 0.05}),
    "dora": ("dora(r={rank})", {"use_dora": True}),
}
"""By name: our spec, and what the configuration of PEFT says."""


def contenders(args: argparse.Namespace) -> dict[str, tuple[Callable[..., Any], list[torch.nn.Parameter]]]:
    """Every contender, adapted and, where it says so, compiled, with what it trains."""
    from peft import LoraConfig, get_peft_model

    base = build(args)
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.get_input_embeddings().requires_grad_(True)
    found = {FLOOR: (torch.compile(frozen, dynamic=False), trained(frozen))}
    for name in args.methods:
        spec, options = METHODS[name]
        ours = rewrite.compile(copy.deepcopy(base), spec.format(rank=args.rank) + "@linear-head", dynamic=False)
        found[f"{OURS} {name}"] = ours, trained(ours)
        if args.peft:
            lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LINEARS, **options)
            eager, compiled = (get_peft_model(copy.deepcopy(base), lora) for _ in range(2))
            found[f"peft {name}"] = eager, trained(eager)
            found[f"peft {name} + compile"] = torch.compile(compiled, dynamic=False), trained(compiled)
    return found


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def stepper(model: Callable[..., Any], trained: Sequence[torch.nn.Parameter], ids: torch.Tensor, adam: bool) -> Step:
    """One step of `model` on a fixed batch, with an optimizer if so asked."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step(_: int) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if adam:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    args = arguments()
    torch.manual_seed(1)
    device = torch.device(args.device)
    ids = torch.randint(0, args.vocab, (args.batch, args.tokens), device=device)
    steps = {name: stepper(*made, ids, args.optimizer) for name, made in contenders(args).items()}
    times = measure(steps, device, Plan(args.rounds, warmup=args.warmup))
    bases = (FLOOR, *(f"{OURS} {name}" for name in args.methods))
    found = {f"/ {base}": ratios(times, base) for base in bases}
    print(f"Llama {args.layers} x {args.hidden}, {args.batch} x {args.tokens} tokens, {args.dtype}, r{args.rank}")
    print(f"{headline(about(device))}\n")
    for base, table in found.items():
        for name, row in table.items():
            quartiles = f"quartiles {row['low']:.3f} .. {row['high']:.3f}"
            print(f"{name + ' ' + base:42s} median {row['median']:.3f}   {quartiles}")
            if args.pairs:
                print("   " + " ".join(f"{p:.3f}" for p in row["pairs"]))
    if args.json:
        write(args.json, {"arguments": settings(args), "about": about(device), "ratios": found})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("hidden", 768), ("batch", 2), ("tokens", 256), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=METHODS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--optimizer", action="store_true", help="AdamW in every step")
    parser.add_argument("--no-peft", dest="peft", action="store_false", help="ours and the floor only")
    parser.add_argument("--no-pairs", dest="pairs", action="store_false", help="print medians and quartiles only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
