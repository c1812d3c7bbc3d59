"""Base models: a local Hugging Face folder, or a small language model that is pre-trained on the spot.

Nothing is ever downloaded, and code that comes with a checkpoint is not run.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.finetune import corpus
from rewrite.finetune.training import Curve, train

BUILT_IN = "a byte-level Llama, pre-trained here on Python's standard library"
LENGTH = 256  # tokens in a row that the built-in model is made for
_BATCH = 8


@dataclass(frozen=True)
class Base:
    """A base model ready to adapt, its tokenizer, and `fresh()`: another copy of it, made anew."""

    model: nn.Module
    tokenizer: Any
    fresh: Callable[[], nn.Module]
    about: str


def transformers() -> Any:
    """The library, imported when first needed; raises `RewriteError` where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, at the import
    try:
        import transformers
    except ImportError as error:
        raise RewriteError("this needs transformers: pip install 'peft-rewrite[hf]'") from error
    return transformers


def config_of(folder: str | os.PathLike[str]) -> Any:
    """The configuration of a local Hugging Face folder."""
    place = Path(folder)
    if not place.is_dir():
        raise RewriteError(f"no such model folder: {place} (models come from local folders, nothing is downloaded)")
    if not (place / "config.json").is_file():
        raise RewriteError(f"{place} is not a Hugging Face model folder: it has no config.json")
    with _explained(f"cannot read {place / 'config.json'}"):
        return transformers().AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def built_in_config() -> Any:
    """The configuration of the built-in model: Llama with 256 byte tokens, 1.9 M parameters."""
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


def skeleton(folder: str | None, causal: bool = False) -> nn.Module:
    """A model without numbers, on the meta device: names and shapes at any size, in a moment.

    `folder` is a Hugging Face folder, of which config.json is read alone; None is the built-in model.  It is the
    class that config.json names, or with `causal` the one for language modelling.
    """
    config = built_in_config() if folder is None else config_of(folder)
    config.use_cache = False
    hf = transformers()
    if causal and type(config) not in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RewriteError(f"{folder} holds a {config.model_type} model, which is not a causal language model")
    name = (getattr(config, "architectures", None) or ["?"])[0]
    named = getattr(hf, name, None)
    with _explained(f"cannot build the model of {folder}"), torch.device("meta"):
        if type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING and (causal or named is None):
            return hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return named._from_config(config) if named else hf.AutoModel.from_config(config, trust_remote_code=False)


def load(folder: str | os.PathLike[str], device: torch.device) -> Base:
    """A causal language model and its tokenizer from a local folder."""
    hf, place = transformers(), Path(folder)
    config_of(place)

    def fresh() -> nn.Module:
        with _explained(f"cannot load the model in {place}"):
            model = hf.AutoModelForCausalLM.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        model.config.use_cache = False
        return model.to(device).eval()

    tokenizer, model = tokenizer_of(place), fresh()
    return Base(model, tokenizer, fresh, f"{type(model).__name__} of {place}")


def tokenizer_of(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder."""
    place = Path(folder)
    with _explained(f"cannot load the tokenizer in {place}"):
        return transformers().AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """What transformers raises for a folder that does not fit, as an error of ours with its first line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RewriteError(f"{doing}: {reason[:300]}") from error


def byte_tokenizer() -> Any:
    """A Hugging Face tokenizer whose 256 tokens are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH)


def pretrain(steps: int, seed: int, device: torch.device) -> tuple[Base, Curve]:
    """The built-in model, pre-trained on the source of Python's standard library, and how that went."""
    tokenizer, texts = byte_tokenizer(), corpus.python_source()
    blocks = corpus.split(corpus.tokenise(texts, tokenizer, "read Python"), LENGTH, _BATCH, "the standard library")
    torch.manual_seed(seed)
    model = transformers().LlamaForCausalLM(built_in_config()).to(device)
    curve = train(
        model,
        blocks.train,
        steps=steps,
        batch=_BATCH,
        learning_rate=4e-3,
        seed=seed,
        progress="pre-train",
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    model.eval()
    kept = copy.deepcopy(model)
    return Base(model, tokenizer, lambda: copy.deepcopy(kept), f"{BUILT_IN} ({len(texts)} files)"), curve


def save_base(base: Base, folder: str | os.PathLike[str]) -> None:
    """Write model and tokenizer as a Hugging Face folder; it appears whole or not at all."""
    place = Path(folder)
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        base.model.save_pretrained(part)
        base.tokenizer.save_pretrained(part)
        part.rename(place)
    except OSError as error:
        raise RewriteError(f"cannot save the base model to {place}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
