"""One training step of LoRA, interleaved in one process: rewrite, HF PEFT eager, HF PEFT + torch.compile.

    python benchmarks/train_step.py                 # prints ratios pair by pair with their spread
    python benchmarks/train_step.py --json out.json --rounds 40

Every round runs each contender once, in an order that rotates; a ratio compares two runs of one round, so that a
disturbance of the machine hits both.  The same weights, the same batch, forward + backward + AdamW of the adapters.
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


def contenders(args: argparse.Namespace) -> dict[str, tuple[Callable[..., Any], list[torch.nn.Parameter]]]:
    """Every contender, adapted and, where it says so, compiled, with what it trains."""
    from peft import LoraConfig, get_peft_model

    base = build(args)
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, lora_dropout=args.dropout, target_modules=LINEARS)
    dropout = f", dropout={args.dropout}" if args.dropout else ""
    spec = f"lora(r={args.rank}{dropout})@linear-head"
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.get_input_embeddings().requires_grad_(True)
    ours = rewrite.compile(copy.deepcopy(base), spec, dynamic=False)
    eager, compiled = (get_peft_model(copy.deepcopy(base), lora) for _ in range(2))
    return {
        OURS: (ours, trained(ours)),
        "peft eager": (eager, trained(eager)),
        "peft + compile": (torch.compile(compiled, dynamic=False), trained(compiled)),
        "frozen base": (torch.compile(frozen, dynamic=False), trained(frozen)),
    }


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def stepper(model: Callable[..., Any], trained: Sequence[torch.nn.Parameter], ids: torch.Tensor) -> Step:
    """One optimizer step of `model` on a fixed batch."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step(_: int) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    args = arguments()
    torch.manual_seed(1)
    device = torch.device(args.device)
    ids = torch.randint(0, args.vocab, (args.batch, args.tokens), device=device)
    steps = {name: stepper(*made, ids) for name, made in contenders(args).items()}
    times = measure(steps, device, Plan(args.rounds, warmup=args.warmup))
    found = {f"/ {base}": ratios(times, base) for base in (OURS, "frozen base")}
    print(f"Llama {args.layers} x {args.hidden}, {args.batch} x {args.tokens} tokens, {args.dtype}, LoRA r{args.rank}")
    print(f"{headline(about(device))}\n")
    for base, table in found.items():
        for name, row in table.items():
            print(
                f"{name + ' ' + base:32s} median {row['median']:.3f}   quartiles {row['low']:.3f} .. {row['high']:.3f}"
            )
            if args.pairs:
                print("   " + " ".join(f"{p:.3f}" for p in row["pairs"]))
    if args.json:
        write(args.json, {"arguments": settings(args), "about": about(device), "ratios": found})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("hidden", 768), ("batch", 2), ("tokens", 256), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-pairs", dest="pairs", action="store_false", help="print medians and quartiles only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
