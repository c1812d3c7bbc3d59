"""The command line `rewrite`, also `python -m rewrite`.

What the user got wrong is printed to stderr, without a traceback, and the exit status is 2; a check that fails is
status 1.  Each command is a few lines over the public functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rewrite
from rewrite.catalogue import described, page
from rewrite.codegen.files import write
from rewrite.codegen.kernels.target import TARGETS
from rewrite.errors import Error, RewriteError, nearest
from rewrite.finetune.bases import built_in_config
from rewrite.finetune.request import Job
from rewrite.folders import config_of, inputs_of, skeleton
from rewrite.progress import waiting
from rewrite.runtime.backend import BACKENDS

Command = Callable[[argparse.Namespace], int]
_MODEL = "folder of a Hugging Face model, of which config.json is enough; default: the small built-in Llama"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    Example: `main(["plan", "--spec", "lora(r=8)@attn.q,v"])`
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except Error as error:
        print(f"rewrite {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rewrite {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rewrite methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def plan(args: argparse.Namespace) -> int:
    if args.sites is None and args.spec is None:
        raise RewriteError("give --spec 'lora(r=8)@attn.q,v', or --sites to see what the model has")
    if args.sites is None:
        rewrite.parse(args.spec)  # before anything slow
    with waiting("build the model"):
        model = _skeleton(args.model)
    if args.sites is not None:
        print(rewrite.plan(model, args.sites) if args.sites else rewrite.sites(model))
    if args.spec is not None:
        print(rewrite.plan(model, args.spec))
    return 0


def diff(args: argparse.Namespace) -> int:
    found = rewrite.diff(_captured(args))
    _write(args.json, lambda: found.to_json())
    if args.html:
        found.to_html(args.html)
    if not (args.html or args.json):
        print(found)
    return 0


def report(args: argparse.Namespace) -> int:
    rewrite.parse(args.spec)  # before anything slow
    with waiting("build the model"):
        model = _skeleton(args.model)
    found = rewrite.report(model, args.spec, tokens=args.length, batch=args.batch)
    _write(args.json, lambda: found.to_json())
    if args.png:
        found.to_png(args.png)
    if not (args.json or args.png):
        print(found)
    return 0


def methods(args: argparse.Namespace) -> int:
    known = rewrite.methods()
    for name in args.names:
        if name not in known:
            close = nearest(name, known, 1)
            raise RewriteError(f"unknown method '{name}'" + (f", did you mean '{close[0]}'?" if close else ""))
    chosen = [known[name] for name in args.names or known]
    print(page(chosen) if args.markdown else "\n\n".join(map(described, chosen)))
    return 0


def kernels(args: argparse.Namespace) -> int:
    from rewrite import kernel_table

    if args.source is not None:
        print(kernel_table.examples(args.source)[0].source, end="")
        return 0
    results = kernel_table.checked(args.names, args.target)
    wrong = kernel_table.complaints(results)
    _write(args.json, lambda: kernel_table.to_json(results))
    if not args.json:
        print(kernel_table.text(results))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if args.check and wrong else 0


def finetune(args: argparse.Namespace) -> int:
    from rewrite.finetune.job import finetune as run

    job = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    return 0 if run(Job(**job)).holds else 1


def _skeleton(folder: str | None) -> Any:
    config = built_in_config() if folder is None else config_of(folder)
    config.use_cache = False
    return skeleton(config)


def _captured(args: argparse.Namespace) -> Any:
    """A model without numbers, compiled on one batch: what the passes do depends on names and shapes alone."""
    rewrite.parse(args.spec)  # before anything slow
    with waiting("capture the graph"):
        model = rewrite.compile(_skeleton(args.model), args.spec, backend="eager")
        batch = inputs_of(model, args.batch, args.length)
        try:
            model(**batch)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            name = type(model).__name__
            raise RewriteError(
                f"{name} reads numbers to decide what to compute: use rewrite.compile in Python"
            ) from error
    return model


def _write(path: str | None, text: Callable[[], str]) -> None:
    if path:
        try:
            write(Path(path), (text() + "\n").encode())
        except OSError as error:
            raise RewriteError(f"cannot write {path}: {error.strerror or error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rewrite",
        description="A PEFT compiler for PyTorch: one string says what to adapt and how.",
        epilog='example: rewrite plan --spec "lora(r=8)@attn.q,v + nf4(base)"',
    )
    parser.add_argument("--version", action="version", version=f"rewrite {rewrite.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    planned = _with_model(
        commands,
        "plan",
        plan,
        "show what a spec would do to a model, or what sites it has",
        "--model llama/ --spec 'lora@attn.q,v'",
        required=False,
    )
    planned.add_argument(
        "--sites", nargs="?", const="", metavar="SITES", help="show the model's sites: all of them, or such as 'attn.q'"
    )
    shown = _with_model(
        commands,
        "diff",
        diff,
        "show what the passes change in the model's graph",
        "--model llama/ --spec 'lora@attn.q,v + nf4(base)' --html diff.html",
    )
    _add_shape(shown)
    shown.add_argument("--html", metavar="FILE", help="write a page to look at")
    shown.add_argument("--json", metavar="FILE", help="write everything, programs included")
    counted = _with_model(
        commands,
        "report",
        report,
        "count what training the model would store and compute",
        "--model llama/ --spec 'lora@linear + nf4(base)' --batch 1 --length 512",
    )
    _add_shape(counted)
    counted.add_argument("--json", metavar="FILE", help="write the numbers")
    counted.add_argument("--png", metavar="FILE", help="draw the memory as bars")
    listed = _command(commands, "methods", methods, "list the methods and their arguments", "lora")
    listed.add_argument("names", nargs="*", metavar="method", help="only these")
    listed.add_argument("--markdown", action="store_true", help="a table, as docs/methods.md has it")
    _add_kernels(commands)
    _add_finetune(commands)
    return parser


def _command(commands: Any, name: str, run: Command, about: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=f"example: rewrite {name} {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _with_model(
    commands: Any, name: str, run: Command, about: str, example: str, required: bool = True
) -> argparse.ArgumentParser:
    parser = _command(commands, name, run, about, example)
    parser.add_argument("--model", metavar="FOLDER", help=_MODEL)
    parser.add_argument("--spec", required=required, help="what to adapt and how, such as 'lora(r=8)@attn.q,v'")
    return parser


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_positive, default=2, metavar="B", help="rows in a batch (default 2)")
    parser.add_argument("--length", type=_length, default=16, metavar="T", help="tokens in a row (default 16)")


def _add_kernels(commands: Any) -> None:
    about = "compile the generated kernels, without a GPU, and show what they take"
    parser = _command(commands, "kernels", kernels, about, "nf4_dequantise --target sm_90 --check")
    parser.add_argument("names", nargs="*", metavar="kernel", help="only these")
    parser.add_argument(
        "--target", action="append", default=[], choices=TARGETS, help="only this architecture; may be given again"
    )
    parser.add_argument("--json", metavar="FILE", help="write every configuration with all that was counted")
    parser.add_argument("--source", metavar="NAME", help="print a generated source of this kernel instead")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where one spills, does not fit, or does not compile"
    )


def _add_finetune(commands: Any) -> None:
    about = "train an adapter on text, check it and save it"
    example = "--model llama/ --data notes/ --spec 'lora(r=8)@linear + nf4(base)' --out adapter/"
    parser = _command(commands, "finetune", finetune, about, example)
    job = {field.name: field.default for field in dataclasses.fields(Job)}

    def option(flag: str, name: str, about: str, **kwargs: Any) -> None:
        default = "" if job[name] is None or kwargs.get("required") else f" (default {job[name]})"
        kwargs.setdefault("default", None if kwargs.get("required") else job[name])
        parser.add_argument(flag, dest=name, help=about.replace("%", "%%") + default, **kwargs)

    option("--model", "model", "local Hugging Face folder; default: a small Llama, pre-trained here", metavar="FOLDER")
    option("--data", "data", "text file, or folder of them; default: Python's language reference", metavar="PATH")
    option("--spec", "spec", "what to adapt and how")
    option("--out", "out", "folder for the adapter, diff.html and result.json", metavar="FOLDER", required=True)
    option("--steps", "steps", "optimizer steps", type=_positive, metavar="N")
    option("--batch", "batch", "rows in a batch", type=_positive, metavar="B")
    option("--length", "length", "tokens in a row; default: what the model takes, up to 256", type=_length, metavar="T")
    option(
        "--lr",
        "learning_rate",
        "largest learning rate; default 1e-2 for the built-in model, else 2e-4; with mezo 1e-3 and 1e-6",
        type=_rate,
        metavar="LR",
    )
    option("--seed", "seed", "of initial values and order", type=int, metavar="S")
    option("--backend", "backend", "what runs the rewritten graph", choices=BACKENDS)
    option("--device", "device", "where to train, such as cuda", metavar="D")
    option("--pretrain-steps", "pretrain_steps", "optimizer steps of the built-in model", type=_positive, metavar="N")
    option("--save-base", "save_base", "keep the built-in base model in a new folder, for --model", metavar="FOLDER")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _length(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {value}")
    return value


def _rate(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value
