"""What is checked on every architecture of the zoo, and the table of results.

    check(case)                        one architecture, both specs: a `Result` with every failure in words
    python -m tests.zoo.check [kind ...] --json FILE      all of them, a line each

Everything runs in float64 where the base does, with every adapter moved away from zero.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import rewrite
from rewrite import inventory
from rewrite.runtime.attach import adapter_state
from rewrite.sites import HINTS
from tests.models import changed, disturb, frozen, gradients, traces
from tests.zoo.build import KINDS, Case, cases
from tests.zoo.probe import attention_operands

SPECS = ("lora(r=4)@attn.q,v", "lora(r=4)@linear")
LOSS, GRADIENT = 1e-6, 1e-4
"""Largest relative differences allowed.  Not tighter, since many models compute norms, rotary embeddings and routers
in float32 whatever their dtype, so that a rounding in the last bit of float64 becomes one of float32."""


@dataclass
class Result:
    """What came out for one architecture: sites and graphs per spec, and what failed."""

    name: str
    kind: str
    skip: str = ""
    sites: dict[str, int] = field(default_factory=dict)  # spec -> placements, 0 where the model has no such site
    graphs: dict[str, int] = field(default_factory=dict)  # "base" and every spec -> graphs under torch.compile
    by_names: list[str] = field(default_factory=list)  # specs that resolve otherwise without the table of names
    probe: str = ""  # what an independent look at attention said of attn.q and attn.v
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failures and not self.skip


class Checker:
    """Runs every check of one architecture."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.result = Result(case.name, case.kind)
        self.model, self.batch = _double(case)

    def fail(self, what: str) -> None:
        self.result.failures.append(what)

    def loss(self, call: Callable[..., Any]) -> torch.Tensor:
        torch.manual_seed(3)
        return self.case.loss(call(**self.batch))

    def step(self, call: Callable[..., Any], model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
        loss = self.loss(call)
        loss.backward()
        return float(loss), gradients(model)

    def run(self) -> Result:
        self.base = frozen(self.model)
        with torch.no_grad():
            self.expected = float(self.loss(self.model))
        self.operands = attention_operands(copy.deepcopy(self.model), self.batch)
        base = torch.compile(copy.deepcopy(self.model), backend="eager", dynamic=True)
        self.result.graphs["base"] = self.graphs(lambda: self.loss(base))
        for spec in SPECS:
            self.attempt(spec, lambda spec=spec: self.spec(spec))
        if self.result.sites.get(SPECS[0]):
            self.attempt("probe", self.probe)
        return self.result

    def attempt(self, what: str, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(
                f"{what}: {type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
            )

    def graphs(self, run: Callable[[], Any]) -> int:
        """How many graphs Dynamo makes in the course of `run`."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def spec(self, spec: str) -> None:
        model = copy.deepcopy(self.model)
        try:
            plan = rewrite.plan(model, spec)
            self.result.sites[spec] = len(plan)
        except rewrite.ResolveError as error:
            self.result.sites[spec] = 0
            if spec != SPECS[0] or self.operands:
                self.fail(f"{spec}: {str(error).partition(chr(10))[0]}")
            return
        self.nameless(model, spec, plan)
        model = rewrite.compile(model, spec, backend="eager")
        with torch.no_grad():
            if (identity := float(self.loss(model.forward))) != self.expected:
                self.fail(f"{spec}: at step 0 the loss is {identity!r}, not {self.expected!r}")
        disturb(model)
        eager, slopes = self.step(model.forward, model)
        if abs(eager - self.expected) <= 1e-9 * abs(self.expected):
            self.fail(f"{spec}: the adapters change nothing")
        compiled: list[Any] = []
        self.result.graphs[spec] = self.graphs(lambda: compiled.extend(self.step(model, model)))
        if self.result.graphs[spec] > self.result.graphs["base"]:
            self.fail(f"{spec}: {self.result.graphs[spec]} graphs, the base has {self.result.graphs['base']}")
        self.compare(spec, eager, slopes, *compiled)
        self.merge(spec, model, eager)
        rewrite.remove(model)
        if differing := changed(self.base, frozen(model)):
            self.fail(f"{spec}: after remove {len(differing)} tensors differ, such as {differing[0]}")
        if left := [trace for trace in traces(model) if trace not in traces(self.model)]:
            self.fail(f"{spec}: remove leaves {left[0]}")

    def nameless(self, model: nn.Module, spec: str, plan: Any) -> None:
        """Whether the same sites are found without the table of names, of what the forward reaches."""
        seen = inventory.take(model).structure

        def reached(plan: Any) -> list[str]:
            sites = [s for s in plan.sites if seen and f"{s.path}.{s.place.tensor}" in seen.uses]
            return [s.name for s in sites]

        with mock.patch.dict(HINTS, dict.fromkeys(HINTS, re.compile(r"(?!)"))):
            try:
                same = reached(rewrite.plan(model, spec)) == reached(plan)
            except rewrite.ResolveError:
                same = not reached(plan)
        self.result.by_names += [] if same else [spec]

    def compare(self, spec: str, eager: float, slopes: dict[str, torch.Tensor], loss: float, compiled: Any) -> None:
        if not _close(loss, eager, LOSS):
            self.fail(f"{spec}: compiled loss {loss!r}, eager {eager!r}")
        largest = max((float(g.abs().max()) for g in slopes.values() if g.numel()), default=0.0)
        for name in slopes | compiled:
            found, wanted = compiled.get(name), slopes.get(name)
            # An adapter behind a selection has no gradient in eager, and zeros where it is computed beside others.
            found = torch.zeros_like(wanted) if found is None else found  # type: ignore[arg-type]
            wanted = torch.zeros_like(found) if wanted is None else wanted
            scale = max(float(wanted.abs().max()), largest * 1e-6) if wanted.numel() else 1.0
            error = float((found - wanted).abs().max()) if wanted.numel() else 0.0
            if error > GRADIENT * scale:
                self.fail(f"{spec}: gradient of {name} differs by {error / scale:.1e}")
                return

    def merge(self, spec: str, model: nn.Module, eager: float) -> None:
        # Not a copy: some models hold on to states that cannot be copied.
        twin = rewrite.attach(copy.deepcopy(self.model), spec)
        with torch.no_grad():
            for name, value in adapter_state(model).items():
                adapter_state(twin)[name].copy_(value)
            merged = float(self.loss(rewrite.merge(twin, untie=True)))
        if not _close(merged, eager, LOSS):
            self.fail(f"{spec}: merged loss {merged!r}, adapted {eager!r}")

    def probe(self) -> None:
        """An adapter of attn.q in the first layer that has one moves queries alone; of attn.v, values alone."""
        said = []
        for role in "qv":
            # Linear attention is not seen by the probe; a tower that the batch does not reach moves nothing.
            sites = [s for s in rewrite.plan(self.model, f"attn.{role}").sites if "mixer" not in s.roles]
            moved, site = set(), None
            for site in sites[:6]:
                now = self.moved(role, site.path)
                if now is None:
                    self.result.probe = "not seen"
                    return
                if moved := now:
                    break
            said.append(f"{role}->{'+'.join(sorted(moved)) or 'nothing'}")
            # Where keys are the values too, both move.
            if moved != {r for r in "qkv" if site and f"attn.{r}" in site.roles}:
                where = site.path if site else "no site"
                self.fail(f"probe: an adapter of attn.{role} at {where} moves {sorted(moved) or 'nothing'}")
        self.result.probe = " ".join(said)

    def moved(self, role: str, path: str) -> set[str] | None:
        """What an adapter of a role at one module changes in the first attention that it changes; None: not seen."""
        model = rewrite.attach(copy.deepcopy(self.model), f"lora(r=4)@attn.{role}")
        for name, parameter in model.named_parameters():
            if name.startswith(f"{path}.") and parameter.requires_grad:
                with torch.no_grad():
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        now = attention_operands(model, self.batch)
        if not self.operands or not now or len(now) != len(self.operands):
            return None
        return next((m for old, new in zip(self.operands, now, strict=True) if (m := old.moved(new))), set())


def _double(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its batch in float64, or as they are where the model does not run so."""
    model = case.build()
    model.requires_grad_(False)
    batch = case.batch(model)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        double = copy.deepcopy(model).double()
        with torch.no_grad():
            case.loss(double(**wide))
        return double, wide
    except Exception:
        return model, batch


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-12)


def check(case: Case) -> Result:
    """Every check of one architecture; never raises."""
    start = time.perf_counter()
    if case.skip:
        return Result(case.name, case.kind, skip=case.skip)
    try:
        result = Checker(case).run()
    except Exception as error:
        result = Result(case.name, case.kind, failures=[f"base: {type(error).__name__}: {str(error)[:200]}"])
    result.seconds = time.perf_counter() - start
    return result


def rows(results: list[Result]) -> Iterator[str]:
    """The table of docs/zoo.md."""
    yield "| architecture | kind | attn.q,v | linear | graphs (base, attn.q,v, linear) | probe | result |"
    yield "|---|---|---|---|---|---|---|"
    for r in results:
        counts = [str(r.sites.get(spec, "-")) for spec in SPECS]
        graphs = " ".join(str(r.graphs.get(key, "-")) for key in ("base", *SPECS))
        verdict = f"skipped: {r.skip}" if r.skip else "ok" if r.ok else "; ".join(r.failures)
        verdict = verdict.replace("|", "/").replace("\n", " ")[:200]
        yield f"| {r.name} | {r.kind} | {' | '.join(counts)} | {graphs} | {r.probe or '-'} | {verdict} |"


def page(results: list[Result]) -> str:
    """docs/zoo.md: counts per kind and the whole table."""
    titles = "kind", "architectures", "ok", "fall short", "skipped", "same sites without names"
    counts = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|"]
    for kind in dict.fromkeys(r.kind for r in results):
        some = [r for r in results if r.kind == kind]
        tried = [r for r in some if not r.skip]
        nameless = sum(not r.by_names for r in tried)
        short = sum(bool(r.failures) for r in tried)
        numbers = len(some), len(tried) - short, short, len(some) - len(tried), f"{nameless} of {len(tried)}"
        counts.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    return text.format(versions=versions, counts="\n".join(counts), table="\n".join(rows(results)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th architecture from the i-th")
    parser.add_argument("--json", help="where results are appended, a line each")
    parser.add_argument("--page", help="run nothing: print docs/zoo.md from such a file")
    args = parser.parse_args(argv)
    if args.page:
        lines = Path(args.page).read_text().splitlines()
        found = [Result(**json.loads(line)) for line in lines]
        order = list(KINDS)
        print(page(sorted(found, key=lambda r: (order.index(r.kind), r.name))))
        return
    quiet()
    part, parts = map(int, args.part.split("/"))
    chosen = [c for kind in args.kinds or KINDS for c in cases(kind) if not args.only or c.name in args.only]
    for case in chosen[part::parts]:
        result = check(case)
        print(f"{result.seconds:6.1f} s  {list(rows([result]))[2]}", flush=True)
        if args.json:
            with Path(args.json).open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def quiet() -> None:
    """Silence what models say while they run."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main(sys.argv[1:])
