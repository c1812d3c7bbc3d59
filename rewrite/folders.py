"""Local Hugging Face folders: configurations, models without numbers, tokenizers, models.

Nothing is ever downloaded, and code that comes with a checkpoint is not run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.errors import Error, RewriteError


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
    with explained(f"cannot read {place / 'config.json'}"):
        return transformers().AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def skeleton(config: Any) -> nn.Module:
    """The model of a configuration without numbers, on the meta device: names and shapes at any size, in a moment.

    It is of the class that the configuration names, or else a causal language model, or else the bare model.
    """
    hf, name = transformers(), (getattr(config, "architectures", None) or [""])[0]
    with explained(f"cannot build a model from the {config.model_type} configuration"), torch.device("meta"):
        if name and isinstance(kind := getattr(hf, name, None), type):
            return kind._from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
        auto = hf.AutoModelForCausalLM if is_causal(config) else hf.AutoModel
        return auto.from_config(config, trust_remote_code=False)


def is_causal(config: Any) -> bool:
    """Whether there is a causal language model for a configuration."""
    return type(config) in transformers().MODEL_FOR_CAUSAL_LM_MAPPING


def tokenizer_of(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder."""
    with explained(f"cannot load the tokenizer in {folder}"):
        return transformers().AutoTokenizer.from_pretrained(
            Path(folder), local_files_only=True, trust_remote_code=False
        )


def model_of(folder: str | os.PathLike[str], device: str) -> nn.Module:
    """The causal language model in a local folder, without its cache of keys and values, in evaluation mode."""
    with explained(f"cannot load the model in {folder}"):
        model = transformers().AutoModelForCausalLM.from_pretrained(
            Path(folder), local_files_only=True, trust_remote_code=False
        )
        model.config.use_cache = False
        return model.to(device).eval()


def inputs_of(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of a Hugging Face model on the meta device: `batch` rows of `length` tokens, or `batch` images.

    Raises `RewriteError` for models of other inputs.
    """
    config, meta = model.config, torch.device("meta")
    ids = torch.zeros(batch, length, dtype=torch.int64, device=meta)
    inputs = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        inputs = {"pixel_values": torch.zeros(batch, config.num_channels, size, size, device=meta)}
    elif model.main_input_name != "input_ids":
        raise RewriteError(f"{type(model).__name__} takes {model.main_input_name}: use rewrite.compile from Python")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """What transformers raises for a folder that does not fit, as an error of ours with its first line."""
    try:
        yield
    except Error:
        raise
    except Exception as error:  # its validators have classes of their own, which change between versions
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RewriteError(f"{doing}: {reason[:300]}") from error
