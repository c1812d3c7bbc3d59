"""The loss pass: which heads and losses it finds, which it leaves, and what it says about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewrite.passes import deferred, pipeline
from rewrite.passes.record import GraphRecord
from tests.models import assert_close
from tests.passes.graphs import capture, inputs

Tensor = torch.Tensor
D, V, T = 7, 23, 11


class Head(nn.Module):
    """A head under a body that trains, and a loss of its logits."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any], bias: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(3, D), nn.Linear(D, V, bias=bias), loss
        self.weight = nn.Parameter(torch.rand(V), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self.head(self.body(x)), y)


def batch(shape: tuple[int, ...] = (2, T)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, 3, generator=g, dtype=torch.float64), torch.randint(0, V, shape, generator=g)


def rewritten(model: nn.Module, *args: Tensor, **fields: Any) -> tuple[Any, GraphRecord]:
    gm = capture(model, *args)
    record = pipeline.run(gm, GraphRecord("test", training=True, **fields))
    return gm, record


def edits(record: GraphRecord) -> list[str]:
    return [edit.rule for edit in record.edits]


def assert_chunked(model: nn.Module, *args: Tensor) -> GraphRecord:
    gm, record = rewritten(model.double(), *args)
    assert edits(record) == ["chunk_loss"], record.notes
    assert not any(n.target in (F.cross_entropy, F.linear) for n in gm.graph.nodes if n.meta.get("site") == "head")
    (found,), expected = gm(*inputs(gm)), model(*args)
    assert_close(found, expected, 1e-13)
    wanted = [p for p in model.parameters() if p.requires_grad]
    up = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view(expected.shape)
    pairs = zip(*(torch.autograd.grad(loss, wanted, up) for loss in (found, expected)), strict=True)
    for ours, theirs in pairs:
        assert_close(ours, theirs, 1e-13)
    return record


def assert_left(model: nn.Module, *args: Tensor, because: str, **fields: Any) -> None:
    gm, record = rewritten(model.double(), *args, **fields)
    assert edits(record) == []
    assert [n.text for n in record.notes] == [f"loss computed from full logits: {because}"]
    found, expected = gm(*inputs(gm)), model(*args)
    assert_close(found[0], expected[0] if isinstance(expected, tuple) else expected, 1e-13)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1))


def padded(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float().double().view(-1, V), F.pad(y, (0, 1), value=-100)[..., 1:].reshape(-1))


def capped(z: Tensor, y: Tensor) -> Tensor:
    z = torch.tanh(z / 3.0) * 3.0
    return F.cross_entropy((0.5 * z).flatten(0, 1), y.flatten(), reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flat": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "module": lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(z.reshape(-1, z.shape[-1]), y.view(-1)),
    "shifted logits": shifted,
    "soft cap": capped,
    "classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y, ignore_index=3),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "sum over a count": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), reduction="sum") / y.numel(),
    "last token": lambda z, y: F.cross_entropy(z[:, -1], y[:, -1]),
    "last token, kept": lambda z, y: F.cross_entropy(z[:, -1:, :].view(-1, V), y[:, -1]),
    "picked rows": lambda z, y: F.cross_entropy(z[torch.arange(2), torch.tensor([1, 3])], y[:, 0]),
    "one row": lambda z, y: F.cross_entropy(z[0, 0], y[0, 0]),
}


FEW = ("last token", "last token, kept", "picked rows", "one row")
"""A few rows of logits take less than the gradient of a weight: chunked only where the head is frozen."""


@pytest.mark.parametrize("loss", LOSSES)
def test_chunked_under_a_frozen_head(loss):
    model = Head(LOSSES[loss])
    model.head.requires_grad_(False)
    assert_chunked(model, *batch())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in FEW])
def test_chunked_with_a_head_that_trains(loss):
    assert_chunked(Head(LOSSES[loss], bias=True), *batch())


@pytest.mark.parametrize("trains", [True, False])
def test_a_weight_whose_gradient_is_more_than_the_logits(trains):
    model, (x, y) = Head(LOSSES["flat"]), batch()
    model.head.requires_grad_(trains)
    if trains:
        reason = "8 rows of 23 logits take no more than the gradients that chunks keep instead"
        assert_left(model, x[:, :4].contiguous(), y[:, :4].contiguous(), because=reason)
    else:
        assert_chunked(model, x[:, :4].contiguous(), y[:, :4].contiguous())


def test_the_cast_of_hugging_face():
    """To float32, in which two orders of a sum differ."""
    model, given = Head(padded).double(), batch()
    gm, record = rewritten(model, *given)
    assert edits(record) == ["chunk_loss"]
    assert_close(gm(*inputs(gm))[0], model(*given), 1e-6)


def test_class_weights():
    model = Head(lambda z, y: z)
    model.loss = lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), model.weight)
    assert_chunked(model, *batch())


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_weighed_by_a_mask(reduction):
    def masked(z: Tensor, y: Tensor) -> Tensor:
        rows = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
        return rows if reduction == "none" else (rows * (y > 5)).sum() / (y > 5).sum()

    model = Head(masked)
    model.head.requires_grad_(False)
    assert_chunked(model, *batch())


def test_a_head_by_a_plain_product():
    class Tied(Head):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.body(x) @ self.head.weight.t(), y)

    assert_chunked(Tied(LOSSES["flat"]), *batch())


def test_two_heads_of_one_body():
    class Two(Head):
        def __init__(self) -> None:
            super().__init__(LOSSES["flat"])
            self.other = nn.Linear(D, V + 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.body(x)
            return self.loss(self.head(h), y) + F.cross_entropy(self.other(h).flatten(0, 1), y.flatten())

    model, given = Two().double(), batch()
    gm, record = rewritten(model, *given)
    assert edits(record) == ["chunk_loss"] * 2
    assert_close(gm(*inputs(gm))[0], model(*given), 1e-13)


def small(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[..., :4].flatten(0, 1), y.flatten() % 4)


REASONS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "argmax": (
        lambda z, y: (LOSSES["flat"](z, y), (z.argmax(-1) == y).sum()),
        "argmax reads its logits too",
    ),
    "a second loss": (
        lambda z, y: LOSSES["flat"](z, y) + 0.1 * z.logsumexp(-1).mean(),
        "logsumexp reads its logits too",
    ),
    "some classes": (small, "its logits come from getitem"),
    "probabilities": (
        lambda z, y: F.cross_entropy(z.view(-1, V), z.detach().view(-1, V).softmax(-1)),
        "its targets are probabilities",
    ),
    "another activation": (lambda z, y: LOSSES["flat"](z.relu(), y), "its logits come from relu"),
    "old reductions": (
        lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), reduce=True),
        "it says how to reduce with size_average or reduce",
    ),
    "rows of a head that trains": (
        lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), reduction="none"),
        'its head trains, and reduction="none" weighs every row by itself',
    ),
}


@pytest.mark.parametrize(("loss", "reason"), REASONS.values(), ids=REASONS)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_left_and_why(loss, reason):
    assert_left(Head(loss), *batch(), because=reason)


def test_a_small_head_is_left():
    model = Head(lambda z, y: F.cross_entropy(z, y))
    model.head = nn.Linear(D, D)
    x, y = batch((4,))
    assert_left(model, x, y % D, because="4 rows of 7 logits take no more than the gradients that chunks keep instead")


def test_logits_before_a_graph_break_are_left():
    reason = "a graph break follows, and what comes after it reads its logits"
    assert_left(Head(lambda z, y: (LOSSES["flat"](z, y), z)), *batch(), because=reason, broken=True)


def test_a_loss_before_a_graph_break_is_chunked():
    _, record = rewritten(Head(LOSSES["flat"]).double(), *batch(), broken=True)
    assert edits(record) == ["chunk_loss"]


def test_inference_is_left():
    gm = capture(Head(LOSSES["flat"]).double(), *batch())
    record = pipeline.run(gm, GraphRecord("test"))
    assert edits(record) == []
    assert record.notes == []


def test_returned_logits_are_deferred():
    model = Head(lambda z, y: (LOSSES["flat"](z, y), z, z.float())).double()
    given = batch()
    gm, record = rewritten(model, *given)
    later = deferred.split(gm, record)
    assert edits(record) == ["chunk_loss", "defer_logits", "defer_logits"]
    assert not any(n.target is F.linear and n.meta["site"] == "head" for n in gm.graph.nodes)
    loss, hidden, same = gm(*inputs(gm))
    expected, logits, single = model(*given)
    assert_close(loss, expected, 1e-13)
    assert hidden is same
    for each, wanted in zip(later, (logits, single), strict=True):
        found = each.program(hidden, *(inputs(gm)[i] for i in each.inputs))
        assert (each.classes, each.dtype) == (V, wanted.dtype)
        assert_close(found, wanted, 1e-13)


def test_the_edit_reads_from_before_to_after():
    record = assert_chunked(Head(LOSSES["flat"]), *batch())
    (edit,) = record.edits
    assert [line.partition(" = ")[2].partition("(")[0] for line in edit.removed] == [
        "linear",
        "linear_1.flatten",
        "cross_entropy",
    ]
    assert edit.added[-1].startswith("linear_cross_entropy = linear_cross_entropy(reshape, [head_weight], 'dense'")
    assert edit.equation.startswith("cross_entropy(f(linear(x, W, b)), target) -> linear_cross_entropy(")
