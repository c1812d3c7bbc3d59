"""What the models of the zoo are fed: text of their own for language models, otherwise the first of the product's own
candidates that runs, with labels where the model gives a loss; a few models have a function each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rewrite.structure.inputs import candidates
from tests.zoo.sizes import VOCAB

Batch = dict[str, Any]
BATCH, LENGTH = 2, 12


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB - 10, shape, generator=torch.Generator().manual_seed(1))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def batch_of(name: str, kind: str, model: nn.Module) -> Batch:
    """The keyword arguments of a model of the zoo; random, seeded."""
    own = OWN.get(f"{kind}/{name}")
    if own is not None:
        return own(model)
    if kind == "causal":
        return text(model)
    return labelled(kind, model, first_that_runs(model))


def text(model: nn.Module, length: int = LENGTH) -> Batch:
    return {"input_ids": ids(BATCH, length), "labels": ids(BATCH, length), "use_cache": False}


def first_that_runs(model: nn.Module) -> Batch:
    """The product's first batch that the model takes."""
    first: Exception | None = None
    for inputs in candidates(model):
        try:
            with torch.no_grad(), torch.random.fork_rng():
                model(*inputs.args, **inputs.kwargs)
        except Exception as error:
            first = first or error
        else:
            return dict(inputs.kwargs)
    raise RuntimeError(f"no candidate runs; the first: {first}") from first


def labelled(kind: str, model: nn.Module, batch: Batch) -> Batch:
    """The batch with what makes the model give a loss, where that is as simple as tokens or a class."""
    parameters = inspect.signature(model.forward).parameters
    text = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    if "return_loss" in parameters:
        return {**batch, "return_loss": True}
    if "labels" not in parameters or kind not in ("encoder", "encoder-decoder") or text not in batch:
        return batch
    return {**batch, "labels": ids(*batch[text].shape)}


def loss_of(output: Any) -> Tensor:
    """The loss that a model returns, or else a weighted mean of every floating tensor that it returns.

    Weighted, since the plain sum of a normalised output is a constant.
    """
    loss = output.get("loss") if hasattr(output, "get") else None
    if isinstance(loss, Tensor):
        return loss
    tensors = [each for each in tree_leaves(dict(output) if hasattr(output, "items") else output) if differs(each)]
    return torch.stack([(each.flatten() * weights(each)).mean() for each in tensors]).sum()


def differs(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())


def weights(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), dtype=value.dtype, device=value.device).sin()


def codebooks(model: Any) -> Batch:
    books = model.config.num_codebooks
    return {"input_ids": ids(BATCH * books, LENGTH), "labels": ids(BATCH, LENGTH, books), "use_cache": False}


def captioning(model: Any) -> Batch:
    size = model.config.vision_config.image_size
    return text(model) | {"pixel_values": normal(BATCH, 3, size, size)}


def in_step(model: Any) -> Batch:
    """Eight frames of sound for every token of text."""
    bins = model.config.audio_config.num_mel_bins
    return {"input_ids": ids(BATCH, 16), "input_features": normal(BATCH, bins, 128), "use_cache": False}


def channels(model: Any) -> Batch:
    shape = (BATCH, 7, model.config.decoder_config.num_channels)
    return {"input_ids": ids(BATCH, LENGTH), "decoder_input_ids": ids(*shape), "use_cache": False}


def interleaved(model: Any) -> Batch:
    size = model.config.vision_config.image_size
    seen = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
    return text(model) | {"pixel_values": normal(BATCH, 1, 3, size, size), "image_attention_mask": seen}


def grounded(model: Any) -> Batch:
    size, count = model.config.vision_config.image_size, model.config.latent_query_num
    batch = text(model, LENGTH + count)
    stands = torch.zeros(BATCH, LENGTH + count, dtype=torch.long)
    stands[:, 1 : 1 + count] = 1
    return batch | {"pixel_values": normal(BATCH, 3, size, size), "image_embeds_position_mask": stands}


OWN: dict[str, Callable[[nn.Module], Batch]] = {
    "causal/musicgen": codebooks,
    "causal/musicgen_melody": codebooks,
    "causal/git": captioning,
    "causal/reformer": lambda model: text(model, 32),
    "encoder/reformer": lambda model: {"input_ids": ids(BATCH, 32), "labels": ids(BATCH, 32)},
    "encoder/perceiver": lambda model: {"input_ids": ids(BATCH, 64), "labels": ids(BATCH, 64)},
    "encoder-decoder/voxtral_realtime": in_step,
    "audio/voxtral_realtime": in_step,
    "audio/dia": channels,
    "multimodal/idefics": interleaved,
    "multimodal/kosmos-2": grounded,
}
"""Kind and model type -> its batch, for the models that need more than the rule."""
