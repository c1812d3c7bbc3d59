"""The batches that the product makes: for modules without a configuration, and for those with one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rewrite.structure.about import BATCH
from rewrite.structure.inputs import Inputs, candidates


def running(model: nn.Module) -> tuple[int, Inputs]:
    """The first batch that runs, and how many were tried before it."""
    for tried, inputs in enumerate(candidates(model)):
        try:
            with torch.no_grad():
                model(*inputs.args, **inputs.kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        return tried, inputs
    raise AssertionError("no batch runs")


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class UNet(nn.Module):
    """Down, up, a skip, a time embedding and cross-attention to a context of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.enter = nn.Conv2d(4, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.cross = nn.MultiheadAttention(16, 2, kdim=24, vdim=24, batch_first=True)
        self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = self.time(timestep.to(sample.dtype)[:, None])
        skip = self.enter(sample) + time[:, :, None, None]
        low = self.down(skip)
        tokens = low.flatten(2).transpose(1, 2)
        tokens = tokens + self.cross(tokens, encoder_hidden_states, encoder_hidden_states)[0]
        low = tokens.transpose(1, 2).view_as(low)
        return self.leave(torch.cat([self.up(low), skip], dim=1))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.rnn = nn.LSTM(8, 6, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.rnn(self.words(tokens))[0]


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


class TwoTowers(nn.Module):
    """Text and image both wanted, sizes from nested configurations alone."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="",
            text_config=SimpleNamespace(model_type="", vocab_size=40),
            vision_config=SimpleNamespace(model_type="", image_size=20, patch_size=5, num_channels=2),
        )
        self.text = nn.Embedding(40, 8)
        self.image = nn.Conv2d(2, 8, 5, stride=5)
        self.position = nn.Parameter(torch.zeros(16, 8))

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, use_cache: bool = True):
        if input_ids is None or pixel_values is None:
            raise ValueError("both")
        assert not use_cache
        return self.text(input_ids).mean(1) * (self.image(pixel_values).flatten(2).mT + self.position).mean(1)


PLAIN = {
    "mlp": (lambda: nn.Sequential(nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 3)), 0),
    "cnn": (ConvNet, 0),
    "transformer": (lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True), 0),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 2, 24), 0),
    "attention": (lambda: nn.MultiheadAttention(16, 2), 0),
    "attention of three widths": (lambda: nn.MultiheadAttention(16, 2, kdim=12, vdim=20), 0),
    "unet": (UNet, 0),
    "tagger": (Tagger, 0),
    "wrapper": (lambda: Wrapper(Tagger()), 0),
    "two towers": (TwoTowers, 0),
    "sequence of convolutions": (lambda: nn.Sequential(nn.Conv1d(7, 5, 3), nn.BatchNorm1d(5)), 0),
    "volume": (lambda: nn.Conv3d(2, 3, 3), 0),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_runs(name: str):
    build, most = PLAIN[name]
    tried, inputs = running(build().eval())
    assert tried <= most, f"{tried} failed before {inputs}"


@pytest.mark.parametrize("name", PLAIN)
def test_batches_are_deterministic_and_leave_the_random_state(name: str):
    model = PLAIN[name][0]()
    state = torch.get_rng_state()
    first, second = (next(candidates(model)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert str(first) == str(second)
    for key, value in first.kwargs.items():
        assert value is second.kwargs[key] or torch.equal(value, second.kwargs[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floating_inputs_have_the_dtype_of_the_parameters(dtype: torch.dtype):
    inputs = next(candidates(ConvNet().to(dtype)))
    assert inputs.kwargs["x"].dtype == dtype
    assert not inputs.kwargs["x"].requires_grad


def test_inputs_are_on_the_device_of_the_parameters():
    assert next(candidates(Tagger().to("meta"))).kwargs["tokens"].device.type == "meta"


def test_ids_are_ordinary_tokens_of_the_vocabulary():
    model = Tagger()
    model.config = SimpleNamespace(model_type="", vocab_size=30, pad_token_id=3, image_token_id=10)
    tokens = next(candidates(model)).kwargs["tokens"]
    assert tokens.dtype == torch.int64
    assert tokens.shape[0] == BATCH
    assert tokens.max() < 30
    assert not torch.isin(tokens, torch.tensor([3, 10])).any()


def test_the_batch_that_a_model_names_is_brought_into_its_vocabulary():
    class Named(Tagger):
        main_input_name = "tokens"
        dummy_inputs = {"tokens": torch.tensor([[1, 2]]), "mask": torch.ones(1, 2)}  # noqa: RUF012

    inputs = next(candidates(Named()))
    assert list(inputs.kwargs) == ["tokens", "mask"]


def test_images_stand_for_tokens_in_the_text_as_often_as_the_configuration_says():
    model = TwoTowers()
    model.config.image_token_id = 39
    model.config.image_seq_length = 4
    ids = next(candidates(model)).kwargs["input_ids"]
    assert (ids == 39).sum(1).tolist() == [4] * BATCH


def test_decoders_get_ids_of_their_own_length():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(model_type="", vocab_size=20, is_encoder_decoder=True)
            self.words = nn.Embedding(20, 4)

        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
            return self.words(decoder_input_ids) @ self.words(input_ids).mT

    _, inputs = running(Pair())
    assert inputs.kwargs["decoder_input_ids"].shape[1] != inputs.kwargs["input_ids"].shape[1]


def test_batches_are_not_repeated():
    shown = [f"{inputs} {[value.dtype for value in inputs.kwargs.values()]}" for inputs in candidates(UNet())]
    assert len(shown) == len(set(shown))
