"""Batches to try a model's forward with, made from its signature, its configuration and its first layers.

Nothing here knows an architecture: only names of arguments, names of configuration fields and types of modules.
Whether a batch runs is for the caller to try; this module only makes them, likely ones first. It needs no
transformers: a configuration is anything with the fields.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
LENGTH = 12  # tokens
MEMORY = 7  # tokens of a decoder or of a context: another number than LENGTH, so that the two can be told apart
TRIES = 12  # batches of one choice of arguments; of a model that has no configuration, four times as many
PATCHES = 4  # of an image that comes in patches: so many down and across
PLACEHOLDERS = 1024  # at most so many image tokens in a text


@dataclass(frozen=True, eq=False)
class Inputs:
    """What to call a model with: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [*((f"#{index}", value) for index, value in enumerate(self.args)), *self.kwargs.items()]
        return ", ".join(f"{name}={list(v.shape) if isinstance(v, Tensor) else v}" for name, v in named)


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Batches for one forward of `model`, best first.

    `next(candidates(LlamaForCausalLM(config)))` holds `input_ids` (2, 12) and `use_cache=False`.
    Tensors are on the device of the model's parameters, floating ones in their dtype; none asks for a gradient.
    A batch that does not run is no error here: the caller takes the next one.
    """
    about = _About(model)
    parameters = _parameters(model)
    tries = TRIES if about.configs else 4 * TRIES
    constants = {"use_cache": False} if _takes_cache(model, about, parameters) else {}
    seen: set[str] = set()
    for choice in _choices(model, about, parameters):
        order = _in_step if "mm_token_type_ids" in choice else _combinations
        for values in itertools.islice(order(list(choice.values())), tries):
            kwargs = dict(zip(choice, values, strict=True))
            found = _inputs(kwargs, parameters, constants)
            key = f"{found} {[v.dtype for v in kwargs.values() if isinstance(v, Tensor)]}"
            if key not in seen:
                seen.add(key)
                yield found


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of the forward; of the wrapped module's, where a wrapper only passes everything on."""
    found = inspect.signature(model.forward).parameters
    named = {name: each for name, each in found.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    children = list(model.children())
    if not named and found and children and not isinstance(model, nn.Sequential):
        return _parameters(children[0])
    return named


def _takes_cache(model: nn.Module, about: _About, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether the forward knows `use_cache`; one that only passes it on does if its configuration has it."""
    passing = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values())
    return "use_cache" in parameters or (passing and isinstance(about.get("use_cache"), bool))


def _inputs(kwargs: dict[str, Any], parameters: Mapping[str, inspect.Parameter], constants: dict[str, Any]) -> Inputs:
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_ONLY]
    args = tuple(kwargs[name] for name in positional if name in kwargs)
    return Inputs(args, {name: value for name, value in kwargs.items() if name not in positional} | constants)


def _combinations(variants: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Every combination, those of likely values first."""
    ranks = sorted(itertools.product(*(range(len(each)) for each in variants)), key=sum)
    yield from (tuple(each[rank] for each, rank in zip(variants, chosen, strict=True)) for chosen in ranks)


def _in_step(variants: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """First with first, second with second, ..., then every combination."""
    if all(variants):
        for index in range(max(map(len, variants))):
            yield tuple(each[min(index, len(each) - 1)] for each in variants)
    yield from _combinations(variants)


# ---------------------------------------------------------------------------------------------- which arguments

MODALITIES = r"input_ids|pixel_values|input_features|input_values|flattened_patches|past_values|sample|audio_mel"
EXTRAS = r"timesteps?|encoder_hidden_states|image_grid_thw|pooled_projections|bbox|past_(time_features|observed_mask)"
COMPANIONS = {
    "sample": re.compile(EXTRAS),
    "hidden_states": re.compile(EXTRAS + r"|class_labels"),
    "pixel_values": re.compile(r"image_grid_thw|mm_token_type_ids|spatial_shapes|pixel_attention_mask"),
    "input_ids": re.compile(r"bbox"),
    "past_values": re.compile(EXTRAS),
    "input_features": re.compile(r"feature_attention_mask"),
}

Choice = dict[str, list[Any]]


def _choices(model: nn.Module, about: _About, parameters: Mapping[str, inspect.Parameter]) -> Iterator[Choice]:
    required = [name for name, each in parameters.items() if each.default is each.empty]
    modalities = [name for name in parameters if re.fullmatch(MODALITIES, name)]
    main = getattr(model, "main_input_name", None)
    main = main if isinstance(main, str) and main in parameters else None
    towers = [name for name in modalities if about.has(name)]
    sets: list[list[str]] = []
    if about.configs:
        sets += [towers] if "input_ids" in towers or len(towers) == 1 else []
        sets += [["input_ids", name] for name in towers if name != "input_ids" and "input_ids" in towers]
        sets += [[main]] if main else []
    sets += [[name] for name in modalities]
    sets += [[]]
    yield from _dummy(model, about, parameters)
    for names in sets:
        names = list(dict.fromkeys([*names, *(name for name in required if not _filled(name, names))]))
        names += [name for name in about.decoder_arguments(parameters) if name not in names]
        for first in list(names):
            pattern = COMPANIONS.get(first)
            names += [name for name in parameters if pattern and pattern.fullmatch(name) and name not in names]
        if "spatial_shapes" not in names:  # without, the mask is over pixels, and is seldom needed
            names = [name for name in names if name != "pixel_attention_mask" or name in required]
        if names:
            yield {name: list(_variants(name, names, about)) for name in parameters if name in names}


def _filled(name: str, names: Sequence[str]) -> bool:
    """Whether a required argument stands for another that is given."""
    return name == "inputs_embeds" and "input_ids" in names


def _dummy(model: nn.Module, about: _About, parameters: Mapping[str, inspect.Parameter]) -> Iterator[Choice]:
    """The batch that the model names itself, ids brought into the vocabulary; ids alone say too little."""
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception:  # a property of the user's class
        return
    if not isinstance(dummy, Mapping) or set(dummy) <= {"input_ids"} or not set(dummy) <= set(parameters):
        return
    yield {
        name: [about.ids(*value.shape) if name.endswith("input_ids") else value.to(about.device)]
        for name, value in dummy.items()
        if isinstance(value, Tensor)
    }


def _variants(name: str, names: Sequence[str], about: _About) -> Iterator[Any]:
    """The values to try for an argument, beside the other arguments that are given."""
    for pattern, make in ARGUMENTS:
        if re.fullmatch(pattern, name):
            yield from make(about, names)
            return
    yield from about.by_layer(names)


# ---------------------------------------------------------------------------------------------- what is known


class _About:
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


# ---------------------------------------------------------------------------------------------- by type of layer


def _linear(about: _About, leaf: Any) -> Iterator[Tensor]:
    yield about.float(BATCH, LENGTH, leaf.in_features)
    yield about.float(BATCH, leaf.in_features)


def _convolution(about: _About, leaf: Any) -> Iterator[Tensor]:
    dims = len(leaf.kernel_size)
    for size in {1: (64, 400, 4000), 2: (32, 64), 3: (16,)}[dims]:
        yield about.float(BATCH, leaf.in_channels, *[size] * dims)


def _normalisation(about: _About, leaf: Any) -> Iterator[Tensor]:
    shape = getattr(leaf, "normalized_shape", None)
    if shape is not None:
        yield about.float(BATCH, LENGTH, *shape)


FEATURES: dict[Any, Callable[[_About, Any], Iterator[Tensor]]] = {
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


# ---------------------------------------------------------------------------------------------- by name of argument

Names = Sequence[str]


def _pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(each, int) for each in value[-2:]):
        return value[-2], value[-1]
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return (value, value) if isinstance(value, int) and value > 0 else (default, default)


def _image_size(about: _About) -> tuple[int, int]:
    return _pair(about.get("image_size", "crop_size", "resolution", "img_size", within="vision"), 64)


def _channels(about: _About) -> int:
    return about.size("num_channels", "in_channels", "in_chans", "channels", within="vision", default=3)


def _grid(about: _About) -> tuple[int, int, int]:
    merge = about.size("spatial_merge_size", within="vision", default=2)
    return 1, 2 * merge, 2 * merge


def _pixel_values(about: _About, names: Names) -> Iterator[Tensor]:
    channels = _channels(about)
    if "spatial_shapes" in names:
        yield about.float(BATCH, PATCHES**2, channels * math.prod(_pair(about.get("patch_size", within="vision"), 16)))
        return
    if "image_grid_thw" in names:
        patch = math.prod(_pair(about.get("patch_size", within="vision"), 14))
        depth = about.size("temporal_patch_size", within="vision", default=1)
        yield about.float(BATCH * math.prod(_grid(about)), channels * depth * patch)
        yield about.float(
            BATCH * math.prod(_grid(about)), channels, *_pair(about.get("patch_size", within="vision"), 14)
        )
        return
    height, width = _image_size(about)
    yield about.float(BATCH, channels, height, width)
    frames = about.size("num_frames", "num_image_with_embedding", within="vision", default=1)
    yield about.float(BATCH, frames, channels, height, width)
    yield about.float(BATCH, channels, 64, 64)


def _input_ids(about: _About, names: Names) -> Iterator[Tensor]:
    text = about.ids(BATCH, LENGTH)
    token = _image_token(about, names)
    for count in () if token is None else _image_tokens(about, names):
        assert token is not None
        yield torch.cat([text[:, :1], text.new_full((BATCH, count), token), text[:, 1:]], dim=1)
    yield text
    limit = about.size("max_position_embeddings", "n_positions", default=64)
    yield about.ids(BATCH, min(64, limit))
    if (books := about.size("num_codebooks", default=1)) > 1:
        yield about.ids(BATCH * books, LENGTH)


def _flattened(about: _About, names: Names) -> Iterator[Tensor]:
    """Patches in a row, each led by its row and its column."""
    patch = _channels(about) * math.prod(_pair(about.get("patch_size", within="vision"), 16))
    values = about.float(BATCH, PATCHES**2, 2 + about.size("patch_embed_hidden_size", default=patch))
    values[..., :2] = 1
    yield values


def _image_token(about: _About, names: Names) -> int | None:
    token = about.get("image_token_id", "image_token_index") if "pixel_values" in names else None
    return token if isinstance(token, int) and token < about.vocabulary() else None


def _kinds_of_token(about: _About, names: Names) -> Iterator[Tensor]:
    """1 where `input_ids` holds an image, in step with its variants."""
    token = _image_token(about, names)
    yield from (
        (ids == token).long() if token is not None else torch.zeros_like(ids) for ids in _input_ids(about, names)
    )


def _image_tokens(about: _About, names: Names) -> Iterator[int]:
    """How many tokens an image may take in a text: as the configuration says, else counted in patches."""
    merge = about.size("spatial_merge_size", "downsample_factor", "scale_factor", within="vision", default=1)
    if "image_grid_thw" in names:
        counts = [math.prod(_grid(about)) // about.size("spatial_merge_size", default=2) ** 2]
    else:
        patch = _pair(about.get("patch_size", within="vision"), 16)
        grid = math.prod(size // each for size, each in zip(_image_size(about), patch, strict=True))
        said = ("image_seq_length", "image_seq_len", "mm_tokens_per_image", "num_image_tokens", "num_query_tokens")
        counts = [value for name in said if isinstance(value := about.get(name), int)]
        counts += [grid, grid + 1, grid // merge**2, grid // 4, grid // 16]
    yield from (count for count in dict.fromkeys(counts) if 0 < count <= PLACEHOLDERS)


def _features(about: _About, names: Names) -> Iterator[Tensor]:
    """Spectrograms: (batch, bins, frames), (batch, frames, bins) and with a channel."""
    bins = about.size(
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        within="audio",
        default=80,
    )
    source = about.size("max_source_positions", within="audio", default=64)
    longest = about.size("max_length", "spec_size", within="audio", default=64)
    yield about.float(BATCH, bins, 2 * source)
    yield about.float(BATCH, longest, bins)
    yield about.float(BATCH, 64, bins)
    yield about.float(BATCH, bins, 64)
    yield about.float(BATCH, 1, longest, bins)


def _waveform(about: _About, names: Names) -> Iterator[Tensor]:
    """Sound: samples, enough for about LENGTH frames behind the strided convolutions; or a spectrogram."""
    strides = about.get("conv_stride", within="audio")
    samples = math.prod(strides) * (LENGTH + 1) if isinstance(strides, list | tuple) else 4000
    spectrogram = [value for value in _features(about, names) if about.get("num_mel_bins") and strides is None]
    yield from spectrogram
    yield about.float(BATCH, samples)
    yield about.float(BATCH, about.size("audio_channels", "in_channels", default=1), samples)


def _latents(about: _About, names: Names) -> Iterator[Tensor]:
    """What a diffusion backbone denoises: an image of `in_channels`, or tokens that are already projected."""
    channels = about.size("in_channels", "input_channels", default=0)
    if not channels:
        yield from about.by_layer(names)
        return
    height, width = _pair(about.get("sample_size", "image_size"), 16)
    yield about.float(BATCH, channels, min(height, 32), min(width, 32))
    yield about.float(BATCH, channels, height, width)
    yield about.float(BATCH, LENGTH, channels)


def _context(about: _About, names: Names) -> Iterator[Tensor]:
    fields = ("cross_attention_dim", "joint_attention_dim", "caption_channels", "encoder_hidden_size", "text_embed_dim")
    said = [about.size(name, default=0) for name in (*fields, "hidden_size")]
    attending = [each.kdim for each in about.leaves if isinstance(each, nn.MultiheadAttention)]
    widths = [each.in_features for each in about.leaves if isinstance(each, nn.Linear)]
    for width in list(dict.fromkeys(size for size in (*said, *attending, *widths) if size))[:8]:
        yield about.float(BATCH, MEMORY, width)


def _attended(index: int) -> Callable[[_About, Names], Iterator[Tensor]]:
    def make(about: _About, names: Names) -> Iterator[Tensor]:
        found = [each for each in about.leaves if isinstance(each, nn.MultiheadAttention)][:1]
        for each in found:
            yield about.float(BATCH, LENGTH, (each.embed_dim, each.kdim, each.vdim)[index])
        if not found:
            yield from about.by_layer(names)

    return make


def _timestep(about: _About, names: Names) -> Iterator[Tensor]:
    steps = torch.arange(1, BATCH + 1, device=about.device)
    yield steps
    yield steps.to(about.dtype)
    yield steps.to(about.dtype)[:, None]


def _ones(about: _About, names: Names) -> Iterator[Tensor]:
    yield torch.ones(BATCH, LENGTH, dtype=torch.long, device=about.device)


def _classes(about: _About, names: Names) -> Iterator[Tensor]:
    yield torch.arange(BATCH, device=about.device)


def _series(about: _About, names: Names) -> Iterator[Tensor]:
    length = about.size("context_length", default=LENGTH)
    lags = about.get("lags_sequence")
    length += max(lags) if isinstance(lags, list | tuple) and lags else 0
    yield about.float(BATCH, length, about.size("num_input_channels", "input_size", default=1))
    yield about.float(BATCH, length)


def _boxes(about: _About, names: Names) -> Iterator[Tensor]:
    steps = torch.arange(LENGTH, device=about.device)
    box = torch.stack([steps, steps, steps + 5, steps + 3], dim=-1)
    yield box.expand(BATCH, -1, -1).contiguous()


ARGUMENTS: list[tuple[str, Callable[[_About, Names], Iterator[Any]]]] = [
    (r"input_ids|ids|tokens?|token_ids|idx", _input_ids),
    (r"decoder_input_ids", lambda about, names: iter([about.ids(BATCH, MEMORY)])),
    (r"\w+_input_ids", lambda about, names: iter([about.ids(BATCH, LENGTH)])),
    (r"flattened_patches", _flattened),
    (r"pixel_values|images?|pixels|img", _pixel_values),
    (
        r"pixel_values_videos|videos?",
        lambda about, names: iter([about.float(BATCH, about.size("num_frames", default=2), 3, *_image_size(about))]),
    ),
    (r"image_grid_thw", lambda about, names: iter([torch.tensor([_grid(about)] * BATCH, device=about.device)])),
    (r"spatial_shapes", lambda about, names: iter([torch.full((BATCH, 2), PATCHES, device=about.device)])),
    (r"mm_token_type_ids", _kinds_of_token),
    (
        r"pixel_attention_mask",
        lambda about, names: iter([torch.ones(BATCH, PATCHES**2, dtype=torch.long, device=about.device)]),
    ),
    (r"input_features|audio_mel|spectrogram|decoder_input_values", _features),
    (r"input_values|waveform|audio", _waveform),
    (r"past_values|past_observed_mask", _series),
    (r"sample|hidden_states|latents?", _latents),
    (r"encoder_hidden_states|context|cond|conditioning|memory|cross", _context),
    (r"timesteps?|t|time|noise_level|sigma", _timestep),
    (r"class_labels?|labels?|y", _classes),
    (r".*mask", _ones),
    (r"query", _attended(0)),
    (r"key", _attended(1)),
    (r"value", _attended(2)),
    (r"bbox", _boxes),
    (r"position_ids", lambda about, names: iter([torch.arange(LENGTH, device=about.device).expand(BATCH, -1)])),
    (r"token_type_ids", lambda about, names: iter([torch.zeros(BATCH, LENGTH, dtype=torch.long, device=about.device)])),
    (
        r"pooled_projections",
        lambda about, names: iter([about.float(BATCH, about.size("pooled_projection_dim", default=64))]),
    ),
]
"""Name of the argument (a regular expression over the whole of it) -> values to try, likely ones first."""
