"""Whole training steps of Llama models under every method: rewrite, and the peers that install, in interleaved pairs.

    python benchmarks/steps.py                                # the matrix; on a GPU where there is one
    python benchmarks/steps.py --small                        # a model for two cores
    python benchmarks/steps.py --models layer layers --methods lora --tokens 8192 --out results

A step is forward and backward, to the model's input and to what is trained, without an optimizer: that is the same for
all.  One and two decoder layers of Llama-3-8B also give what a layer more costs, and with it the 32 of the model.
What is measured, and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from contest import Contest
from models import METHODS, MODELS, ModelCase, ModelProblem, bound, check, for_method
from series import parsed, parser, series

LAYERS = 32


def cases(args: argparse.Namespace) -> list[ModelCase]:
    """The matrix, methods outermost."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    return [
        ModelCase(method, model, tokens, rank, dtype, device, args.shrink, args.backend)
        for method in args.methods
        for tokens in args.tokens
        for model in args.models
        for rank in args.ranks
    ]


def contest(case: ModelCase) -> Contest:
    """A case with everybody who has the method."""
    return Contest(case, lambda: ModelProblem(case), for_method(case), check, bound(case))


def counted(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Time and saved bytes of all layers of Llama-3-8B: of one, and 31 times what the second of two added."""
    found: list[dict[str, Any]] = []
    pairs: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        case = result["case"]
        key = tuple(case[name] for name in ("method", "tokens", "rank", "dtype"))
        pairs.setdefault(key, {})[case["model"]] = result["rows"]
    for (method, tokens, rank, _), by_model in pairs.items():
        one, two = by_model.get("layer", {}), by_model.get("layers", {})
        rows: dict[str, dict[str, float]] = {}
        for name in one:
            both = one[name], two.get(name, {})
            if all(row.get("times", {}).get("step") for row in both):
                first, second = (row["times"]["step"]["median"] for row in both)
                kept, more = (row["saved_bytes"] for row in both)
                rows[name] = {
                    "seconds": first + (LAYERS - 1) * (second - first),
                    "saved_bytes": kept + (LAYERS - 1) * (more - kept),
                }
        if rows:
            found.append({"method": method, "tokens": tokens, "rank": rank, "rows": rows})
    return found


def main() -> None:
    args = arguments()
    series(map(contest, cases(args)), args, lambda results: {f"counted to {LAYERS} layers": counted(results)})


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    found = parser(__doc__, "steps")
    found.add_argument("--models", nargs="+", default=["layer", "layers", "1b"] if gpu else ["small"], choices=MODELS)
    found.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    found.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192] if gpu else [512])
    found.add_argument("--ranks", type=int, nargs="+", default=[16])
    found.add_argument("--shrink", type=int, default=1, help="divide every size by this")
    return parsed(found, {"models": ["small"], "tokens": [512]})


if __name__ == "__main__":
    main()
