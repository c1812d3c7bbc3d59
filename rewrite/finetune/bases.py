"""Base models: a local folder's, or a small language model that is pre-trained on the spot."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.finetune import corpus
from rewrite.finetune.training import Curve, train
from rewrite.folders import model_of, transformers
from rewrite.progress import waiting

LENGTH = 128  # tokens in a row that the built-in model is made for
_BATCH = 4  # small, for many steps: 4 x 128 learns faster than 8 x 256 from the same tokens


@dataclass(frozen=True)
class Base:
    """A base model to adapt, and `fresh()`: the same model once more, without a trace of what was done to this one."""

    model: nn.Module
    fresh: Callable[[], nn.Module]
    about: str


def load(folder: str | os.PathLike[str], device: str) -> Base:
    """The causal language model in a local Hugging Face folder."""

    def fresh() -> nn.Module:
        with waiting("load the model"):
            return model_of(folder, device)

    model = fresh()
    count = sum(p.numel() for p in model.parameters())
    return Base(model, fresh, f"{type(model).__name__} in {folder}, {count:,} parameters")


def built_in_config() -> Any:
    """The configuration of the built-in model: a Llama over the 256 bytes, 1.9 M parameters."""
    return transformers().LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    )


def byte_tokenizer() -> Any:
    """A Hugging Face tokenizer whose 256 tokens are the bytes of UTF-8: token i is byte i."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The library writes a byte as the character of that number, or where it is no visible one, as the next from 256.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in visible else next(others)): byte for byte in range(256)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH)


def pretrain(steps: int, seed: int, device: str) -> tuple[Base, Curve]:
    """The built-in model, pre-trained on the source of Python's standard library, and how that went."""
    texts = corpus.python_source()
    # What `byte_tokenizer` gives, without its ten seconds.
    tokens = torch.frombuffer(bytearray("".join(t.text for t in texts).encode()), dtype=torch.uint8).long()
    blocks = corpus.split(tokens, LENGTH, _BATCH, "the standard library")
    torch.manual_seed(seed)
    model = transformers().LlamaForCausalLM(built_in_config()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    curve = train(model, blocks.train, optimizer, steps=steps, batch=_BATCH, seed=seed, progress="pre-train")
    kept = copy.deepcopy(model.eval())
    count = sum(p.numel() for p in model.parameters())
    about = f"a byte-level Llama, {count:,} parameters, pre-trained on {len(texts)} files of Python's standard library"
    return Base(model, lambda: copy.deepcopy(kept), about), curve


def save(base: Base, folder: str | os.PathLike[str]) -> None:
    """Write the built-in base and its tokenizer as a Hugging Face folder; it appears whole or not at all."""
    place = Path(folder)
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    model: Any = base.model
    try:
        model.save_pretrained(part)
        byte_tokenizer().save_pretrained(part)
        part.rename(place)
    except OSError as error:
        raise RewriteError(f"cannot save the base model to {place}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
