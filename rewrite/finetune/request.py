"""What a fine-tuning is asked to do, and whether it can be done: every complaint comes from here, before training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rewrite
from rewrite.errors import RewriteError
from rewrite.finetune import bases, corpus
from rewrite.finetune.corpus import Blocks, Text
from rewrite.folders import config_of, is_causal, skeleton, tokenizer_of
from rewrite.runtime.backend import check_backend

DEFAULT_SPEC = "lora(r=8)@linear + full(norm)"
_LENGTH = 256


@dataclass(frozen=True)
class Job:
    """What to fine-tune, on what, and where to: the arguments of `rewrite finetune`.

    `model` and `data` are local paths, None the built-in ones.  `length` is in tokens, None as many as the model
    takes up to 256; `learning_rate` None is 1e-2 for the built-in model and 2e-4 for others, with `mezo` 1e-3 and 1e-6.
    `pretrain_steps` is for the built-in model, and `save_base` a new folder to keep it in.
    """

    out: str
    model: str | None = None
    data: str | None = None
    spec: str = DEFAULT_SPEC
    steps: int = 400
    batch: int = 4
    length: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    backend: str = "inductor"
    device: str = "cpu"
    pretrain_steps: int = 600
    save_base: str | None = None


@dataclass(frozen=True)
class Request:
    """A job that can be done: the canonical spec, the token blocks, and lines that say what will be done."""

    spec: str
    blocks: Blocks
    lines: tuple[str, ...]


def prepare(job: Job) -> Request:
    """Check everything about a job that can be known before there is a model; raises `rewrite.Error`."""
    rewrite.parse(job.spec)
    check_backend(job.backend)
    _check_device(job.device)
    if job.save_base and job.model:
        raise RewriteError("--save-base keeps the built-in base model, and --model names another")
    if job.save_base and Path(job.save_base).exists():
        raise RewriteError(f"--save-base {job.save_base} exists already: give a new folder")
    config = bases.built_in_config() if job.model is None else config_of(job.model)
    if not is_causal(config):
        raise RewriteError(f"{job.model} holds a {config.model_type} model, which is not a causal language model")
    config.architectures = None  # a causal language model, whatever else the folder may hold
    planned = rewrite.plan(skeleton(config), job.spec)
    if not planned.trainable:
        raise RewriteError(f"'{planned.spec}' trains nothing: add a method that does, such as lora(r=8)@attn.q,v")
    length = _length(job, config)
    texts = corpus.english() if job.data is None else corpus.read(job.data)
    blocks = _blocks(job, texts, length, config)
    _check_writable(Path(job.out))
    return Request(planned.spec, blocks, tuple(_lines(job, planned.spec, texts, blocks)))


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RewriteError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error


def _length(job: Job, config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    if job.length is None:
        return min(_LENGTH, longest or _LENGTH)
    if longest is not None and job.length > longest:
        raise RewriteError(f"--length {job.length} is more than the {longest} positions of this model")
    return job.length


def _blocks(job: Job, texts: list[Text], length: int, config: Any) -> Blocks:
    tokenizer = bases.byte_tokenizer() if job.model is None else tokenizer_of(job.model)
    tokens = corpus.tokenise(texts, tokenizer)
    size = getattr(config, "vocab_size", None)
    if size is not None and len(tokens) and int(tokens.max()) >= size:
        raise RewriteError(f"the tokenizer in {job.model} gives token {int(tokens.max())}, the model knows {size}")
    return corpus.split(tokens, length, job.batch, job.data or "pydoc_data.topics")


def _check_writable(out: Path) -> None:
    probe = out / f".{os.getpid()}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RewriteError(f"cannot write to --out {out}: {error.strerror or error}") from error


def _lines(job: Job, spec: str, texts: list[Text], blocks: Blocks) -> list[str]:
    size = sum(len(text.text) for text in texts)
    count, length = blocks.train.shape
    lines = [
        f"spec     {spec}",
        f"data     {job.data or 'pydoc_data.topics'}: {len(texts):,} texts, {size:,} characters",
    ]
    lines += [f"note     {t.replaced:,} invalid bytes in {t.name} were replaced" for t in texts if t.replaced]
    return [*lines, f"blocks   of {length} tokens: {count:,} to train on, {len(blocks.held):,} held out"]
