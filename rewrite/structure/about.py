"""What the configurations and the first layers of a model say about the sizes of its inputs."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
LENGTH = 12  # tokens
MEMORY = 7  # tokens of a decoder or of a context: another number than LENGTH, so that the two can be told apart
PATCHES = 4  # of an image that comes in patches: so many down and across
PLACEHOLDERS = 1024  # at most so many image tokens in a text


class About:
    """What the configurations and the layers of a model say about sizes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.configs = list(_configs(getattr(model, "config", None)))
        tensors = itertools.chain(model.parameters(), model.buffers())
        first = next((each for each in tensors if each.is_floating_point()), torch.empty(0))
        self.device = first.device
        self.dtype = first.dtype if first.dtype.itemsize > 1 else torch.get_default_dtype()
        self.leaves = [each for each in model.modules() if isinstance(each, tuple(FEATURES))]

    def get(self, *names: str, within: str = "") -> Any:
        """The first of these fields that a configuration has, those whose path matches `within` first."""
        ordered = sorted(self.configs, key=lambda pair: not re.search(within, pair[0]))
        for name in names:
            for _, config in ordered:
                if (value := _read(config, name)) is not None:
                    return value
        return None

    def size(self, *names: str, within: str = "", default: int) -> int:
        """As `get`, for a number; the first of several."""
        value = self.get(*names, within=within)
        while isinstance(value, list | tuple) and value:
            value = value[0]
        return value if isinstance(value, int) and value > 0 else default

    def has(self, name: str) -> bool:
        """Whether the configurations hold what an argument needs: a tower that is not built takes no input."""
        fields = {"pixel_values": ("image_size", "patch_size", "num_channels"), "input_ids": ("vocab_size",)}
        return name not in fields or self.get(*fields[name]) is not None

    def decoder_arguments(self, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
        if not self.get("is_encoder_decoder"):
            return []
        found = [name for name in ("decoder_input_ids", "decoder_input_values") if name in parameters]
        return found[:1]

    def float(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(math.prod(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device, self.dtype)

    def ids(self, *shape: int, below: int | None = None) -> Tensor:
        """Ids of ordinary tokens: none of those that the configuration gives a meaning."""
        below = below or self.vocabulary()
        special = {value for value in self.special() if value < below}
        usual = torch.tensor([each for each in range(min(below, 512)) if each not in special] or [0])
        steps = torch.arange(math.prod(shape)) * 7 + 3
        return usual[steps % len(usual)].view(shape).to(self.device)

    def special(self) -> Iterator[int]:
        for _, config in self.configs:
            for name in _names(config):
                if re.search(r"token_(id|index)$", name) and isinstance(value := _read(config, name), int):
                    yield value

    def vocabulary(self) -> int:
        tables = [each.num_embeddings for each in self.leaves if isinstance(each, nn.Embedding)]
        said = self.size("vocab_size", within="text|decoder", default=max(tables, default=10))
        try:
            table = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
            return min(said, table.num_embeddings)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        except Exception:  # only some models have one, and it is not always a table
            return min([said, *tables[:1]])

    def by_layer(self, names: Sequence[str]) -> Iterator[Tensor]:
        """What the first layers of the model take: the guess for an argument whose name says nothing."""
        seen: set[tuple[Any, ...]] = set()
        # An image net with an embedding of the time may register that first; a net over tokens registers a table.
        tables = any(isinstance(each, nn.Embedding) for each in self.leaves[:1])
        images = [] if tables else [each for each in self.leaves if isinstance(each, nn.Conv2d | nn.Conv3d)][:1]
        for leaf in (*images, *self.leaves):
            for value in next(make for kind, make in FEATURES.items() if isinstance(leaf, kind))(self, leaf):
                key = (*value.shape, value.dtype)
                if key not in seen:
                    seen.add(key)
                    yield value


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and those inside it, outermost first, each with its path."""
    level = [(path, config)] if config is not None and not isinstance(config, type) else []
    while level:
        yield from level
        level = [
            (f"{outer}.{name}", value)
            for outer, each in level
            for name in _names(each)
            if name.startswith("_") is False and _is_config(value := _read(each, name))
        ]


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and not isinstance(value, type | nn.Module)


def _names(config: Any) -> list[str]:
    return list(config) if isinstance(config, Mapping) else list(getattr(config, "__dict__", ()))


def _read(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except Exception:  # a field that has one value per layer may raise when asked for the one
        return None


def _linear(about: About, leaf: Any) -> Iterator[Tensor]:
    yield about.float(BATCH, LENGTH, leaf.in_features)
    yield about.float(BATCH, leaf.in_features)


def _convolution(about: About, leaf: Any) -> Iterator[Tensor]:
    dims = len(leaf.kernel_size)
    for size in {1: (64, 400, 4000), 2: (32, 64), 3: (16,)}[dims]:
        yield about.float(BATCH, leaf.in_channels, *[size] * dims)


def _normalisation(about: About, leaf: Any) -> Iterator[Tensor]:
    shape = getattr(leaf, "normalized_shape", None)
    if shape is not None:
        yield about.float(BATCH, LENGTH, *shape)


FEATURES: dict[Any, Callable[[About, Any], Iterator[Tensor]]] = {
    nn.Embedding: lambda about, leaf: iter([about.ids(BATCH, LENGTH, below=leaf.num_embeddings)]),
    nn.MultiheadAttention: lambda about, leaf: (
        about.float(BATCH, LENGTH, size) for size in (leaf.embed_dim, leaf.kdim, leaf.vdim)
    ),
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.RNNBase: lambda about, leaf: iter([about.float(BATCH, LENGTH, leaf.input_size)]),
    nn.LayerNorm: _normalisation,
}
"""Type of layer -> inputs that it takes."""
