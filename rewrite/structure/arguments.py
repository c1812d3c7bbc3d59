"""Values to try for an argument of a forward, by its name: ids, pixels, sound, masks, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.structure.about import BATCH, LENGTH, MEMORY, PATCHES, PLACEHOLDERS, About

Names = Sequence[str]


def _pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(each, int) for each in value[-2:]):
        return value[-2], value[-1]
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return (value, value) if isinstance(value, int) and value > 0 else (default, default)


def _image_size(about: About) -> tuple[int, int]:
    return _pair(about.get("image_size", "crop_size", "resolution", "img_size", within="vision"), 64)


def _channels(about: About) -> int:
    return about.size("num_channels", "in_channels", "in_chans", "channels", within="vision", default=3)


def _grid(about: About) -> tuple[int, int, int]:
    merge = about.size("spatial_merge_size", within="vision", default=2)
    return 1, 2 * merge, 2 * merge


def _pixel_values(about: About, names: Names) -> Iterator[Tensor]:
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


def _input_ids(about: About, names: Names) -> Iterator[Tensor]:
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


def _flattened(about: About, names: Names) -> Iterator[Tensor]:
    """Patches in a row, each led by its row and its column."""
    patch = _channels(about) * math.prod(_pair(about.get("patch_size", within="vision"), 16))
    values = about.float(BATCH, PATCHES**2, 2 + about.size("patch_embed_hidden_size", default=patch))
    values[..., :2] = 1
    yield values


def _image_token(about: About, names: Names) -> int | None:
    token = about.get("image_token_id", "image_token_index") if "pixel_values" in names else None
    return token if isinstance(token, int) and token < about.vocabulary() else None


def _kinds_of_token(about: About, names: Names) -> Iterator[Tensor]:
    """1 where `input_ids` holds an image, in step with its variants."""
    token = _image_token(about, names)
    yield from (
        (ids == token).long() if token is not None else torch.zeros_like(ids) for ids in _input_ids(about, names)
    )


def _image_tokens(about: About, names: Names) -> Iterator[int]:
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


def _features(about: About, names: Names) -> Iterator[Tensor]:
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


def _waveform(about: About, names: Names) -> Iterator[Tensor]:
    """Sound: samples, enough for about LENGTH frames behind the strided convolutions; or a spectrogram."""
    strides = about.get("conv_stride", within="audio")
    samples = math.prod(strides) * (LENGTH + 1) if isinstance(strides, list | tuple) else 4000
    spectrogram = [value for value in _features(about, names) if about.get("num_mel_bins") and strides is None]
    yield from spectrogram
    yield about.float(BATCH, samples)
    yield about.float(BATCH, about.size("audio_channels", "in_channels", default=1), samples)


def _latents(about: About, names: Names) -> Iterator[Tensor]:
    """What a diffusion backbone denoises: an image of `in_channels`, or tokens that are already projected."""
    channels = about.size("in_channels", "input_channels", default=0)
    if not channels:
        yield from about.by_layer(names)
        return
    height, width = _pair(about.get("sample_size", "image_size"), 16)
    yield about.float(BATCH, channels, min(height, 32), min(width, 32))
    yield about.float(BATCH, channels, height, width)
    yield about.float(BATCH, LENGTH, channels)


def _context(about: About, names: Names) -> Iterator[Tensor]:
    fields = ("cross_attention_dim", "joint_attention_dim", "caption_channels", "encoder_hidden_size", "text_embed_dim")
    said = [about.size(name, default=0) for name in (*fields, "hidden_size")]
    attending = [each.kdim for each in about.leaves if isinstance(each, nn.MultiheadAttention)]
    widths = [each.in_features for each in about.leaves if isinstance(each, nn.Linear)]
    for width in list(dict.fromkeys(size for size in (*said, *attending, *widths) if size))[:8]:
        yield about.float(BATCH, MEMORY, width)


def _attended(index: int) -> Callable[[About, Names], Iterator[Tensor]]:
    def make(about: About, names: Names) -> Iterator[Tensor]:
        found = [each for each in about.leaves if isinstance(each, nn.MultiheadAttention)][:1]
        for each in found:
            yield about.float(BATCH, LENGTH, (each.embed_dim, each.kdim, each.vdim)[index])
        if not found:
            yield from about.by_layer(names)

    return make


def _timestep(about: About, names: Names) -> Iterator[Tensor]:
    steps = torch.arange(1, BATCH + 1, device=about.device)
    yield steps
    yield steps.to(about.dtype)
    yield steps.to(about.dtype)[:, None]


def _ones(about: About, names: Names) -> Iterator[Tensor]:
    yield torch.ones(BATCH, LENGTH, dtype=torch.long, device=about.device)


def _classes(about: About, names: Names) -> Iterator[Tensor]:
    yield torch.arange(BATCH, device=about.device)


def _series(about: About, names: Names) -> Iterator[Tensor]:
    length = about.size("context_length", default=LENGTH)
    lags = about.get("lags_sequence")
    length += max(lags) if isinstance(lags, list | tuple) and lags else 0
    yield about.float(BATCH, length, about.size("num_input_channels", "input_size", default=1))
    yield about.float(BATCH, length)


def _boxes(about: About, names: Names) -> Iterator[Tensor]:
    steps = torch.arange(LENGTH, device=about.device)
    box = torch.stack([steps, steps, steps + 5, steps + 3], dim=-1)
    yield box.expand(BATCH, -1, -1).contiguous()


ARGUMENTS: list[tuple[str, Callable[[About, Names], Iterator[Any]]]] = [
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
