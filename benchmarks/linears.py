"""Linear layers of Llama-3-8B under every method: rewrite, and the peers that install, in interleaved pairs.

    python benchmarks/linears.py                              # the matrix; on a GPU where there is one
    python benchmarks/linears.py --small                      # sizes for two cores
    python benchmarks/linears.py --methods qlora --tokens 128 2048 --shapes layer --out results
    python benchmarks/linears.py --methods lora --tokens 8192 --profile results/profile.txt

A step is forward and backward to the inputs and to what is trained.  Every timing stands beside its numerics: relative
errors of y, dx and every gradient against float64.  What is measured, and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from checks import check
from contest import Contest
from layers import BOUNDS, IN_A_LAYER, LAYER, METHODS, SHAPES, Case, Problem
from peers import for_method
from series import parsed, parser, series

TOKENS, RANKS = (1, 32, 128, 512, 2048, 8192), (8, 16, 64)


def cases(args: argparse.Namespace) -> list[Case]:
    """The matrix, methods outermost: one rank but for LoRA, whose cost is asked for by rank."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    found: list[Case] = []
    for method in args.methods:
        for tokens in args.tokens:
            for shape in args.shapes:
                ranks = args.ranks if method == "lora" else args.ranks[:1]
                found += [Case(method, shape, tokens, rank, dtype, device, args.shrink, args.backend) for rank in ranks]
    return found


def contest(case: Case) -> Contest:
    """A case with everybody who has the method."""
    return Contest(case, lambda: Problem(case), for_method(case), check, BOUNDS[case.dtype])


def summed(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Times of single shapes weighted over a decoder layer, where all of them were measured."""
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        case = result["case"]
        if case["shape"] in SHAPES:
            key = tuple(case[name] for name in ("method", "tokens", "rank", "dtype"))
            groups.setdefault(key, {})[case["shape"]] = result
    found: list[dict[str, Any]] = []
    for (method, tokens, rank, _), by_shape in groups.items():
        if by_shape.keys() != SHAPES.keys():
            continue
        times: dict[str, float] = {}
        for name in by_shape["down"]["rows"]:
            parts = [_each(by_shape[shape], name, count) for shape, count in IN_A_LAYER.items()]
            if all(part is not None for part in parts):
                times[name] = sum(part for part in parts if part is not None)
        found.append({"method": method, "tokens": tokens, "rank": rank, "seconds": times})
    return found


def _each(result: Mapping[str, Any], name: str, count: int) -> float | None:
    time = result["rows"].get(name, {}).get("times", {}).get("step")
    return None if time is None else time["median"] / result["case"]["linears"] * count


def main() -> None:
    args = arguments()
    series(map(contest, cases(args)), args, lambda results: {"over a layer": summed(results)})


def arguments() -> argparse.Namespace:
    found = parser(__doc__, "linears")
    found.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    found.add_argument("--shapes", nargs="+", default=[LAYER, *SHAPES], choices=[LAYER, *SHAPES])
    found.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    found.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of LoRA; others take the first")
    found.add_argument("--shrink", type=int, default=1, help="divide every size by this")
    return parsed(found, {"shrink": 8, "tokens": (1, 32, 128), "ranks": (8,)})


if __name__ == "__main__":
    main()
