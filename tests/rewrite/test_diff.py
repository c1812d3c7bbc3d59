"""diff: golden text, JSON there and back, and a page that is well formed, self-contained and complete."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from rewrite import page
from rewrite.diff import Diff
from rewrite.listing import read, references, short, tokens
from rewrite.passes.record import Edit, GraphRecord, PassRecord, group
from rewrite.picture import expand, layer
from tests.models import batch, build
from tests.rewrite.decoder import SPEC, Decoder, compiled
from tests.rewrite.test_explain import stable

VOID = {"meta", "input", "br", "path", "rect", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, tags and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return compiled()


def test_text(golden: Callable[..., None]):
    golden(stable(str(rewrite.diff(compiled("lora(r=4)@attn.q,v")))))


def test_text_has_every_group_of_every_graph(decoder: nn.Module):
    diff = rewrite.diff(decoder)
    assert [g.training for g in diff.graphs] == [True, False]
    parts = str(diff).split("\n--- ")[1:]
    assert len(parts) == 2
    for part, record in zip(parts, diff.graphs, strict=True):
        assert record.title in part
        assert [f"@@ {g.heading} @@" in part for g in group(record.edits)] == [True] * len(group(record.edits))


def test_before_the_first_call(tmp_path: Path):
    diff = rewrite.diff(rewrite.compile(Decoder(), SPEC, backend="eager"))
    assert diff.graphs == ()
    assert "no graph captured yet" in str(diff)
    assert Diff.from_json(diff.to_json()) == diff
    assert "No graph captured yet" in Page(diff.to_html(tmp_path / "d.html").read_text(encoding="utf-8")).text


def test_a_plain_model_is_an_error():
    with pytest.raises(rewrite.RewriteError, match="nothing is attached"):
        rewrite.diff(nn.Linear(3, 2))
    with pytest.raises(rewrite.RewriteError, match="nothing is attached"):
        rewrite.diff(rewrite.merge(rewrite.attach(Decoder(), "lora@attn.q")))


def test_a_diff_does_not_change_any_more(decoder: nn.Module):
    diff = rewrite.diff(decoder)
    count = len(diff.graphs[0].passes)
    diff.graphs[0].passes.append(PassRecord("later"))
    assert len(rewrite.diff(decoder).graphs[0].passes) == count


def test_json_is_complete_and_comes_back(decoder: nn.Module):
    diff = rewrite.diff(decoder)
    text = diff.to_json()
    assert Diff.from_json(text) == diff
    for data, record in zip(json.loads(text)["graphs"], diff.graphs, strict=True):
        assert data["before"] == record.before
        assert data["after"] == record.after
        assert sum(len(g["sites"]) for g in data["groups"]) == len(record.edits)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"graphs": 3}', '{"graphs": [], "colour": 1}', '{"graphs": [{}]}'])
def test_other_json_is_an_error(text: str):
    with pytest.raises(rewrite.RewriteError, match="no diff written by to_json"):
        Diff.from_json(text)


def test_page_has_everything_and_needs_nothing(decoder: nn.Module, tmp_path: Path):
    diff = rewrite.diff(decoder)
    source = diff.to_html(tmp_path / "new" / "d.html").read_text(encoding="utf-8")
    found = Page(source)
    assert found.text.count("all 8 sites") == 2 * 2  # per graph: insert and fuse_storage in the attention
    for record in diff.graphs:
        assert record.title in found.text
        for g in group(record.edits):
            assert f"{g.rule} \N{MULTIPLICATION SIGN}{len(g.sites)}" in found.text
            assert set(g.sites) <= set(re.findall(r"<li>(.*?)</li>", source))
        for line in (*record.before.splitlines(), *record.after.splitlines()):
            assert line.strip() in found.text
    assert found.tags.count("svg") == 2 * 3
    assert "script" not in found.tags
    assert not [v for n, v in found.values if n in ("src", "href", "action", "data")]
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_page_has_the_graphs_as_tabs(decoder: nn.Module):
    found = Page(page.page(rewrite.diff(decoder)))
    labels = [v for n, v in found.values if n == "for" and v.startswith("g")]
    assert labels == ["g0", "g1"]
    assert {"graph0", "graph1"} <= {v for n, v in found.values if n == "id"}


def test_page_escapes_names():
    evil = '<script>alert("&1")</script>'
    edit = Edit("rule", f"a.{evil}", f"{evil} -> {evil}", evil, (f"{evil} = x",), (f"y = f('{evil}')",))
    record = GraphRecord("graph_0", before=f"# {evil}\n", after=f"# now {evil}\n", inputs=(evil,))
    record.passes.append(PassRecord("pass", [edit], 1.0))
    record.note(evil, evil)
    source = page.page(Diff(evil, evil, (record,)))
    found = Page(source)
    assert "script" not in found.tags
    assert "<script" not in source
    assert evil in unescape(found.text)


def test_page_is_written_whole_or_not_at_all(decoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "d.html"
    file.write_text("old", encoding="utf-8")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(rewrite.RewriteError, match="disk full"):
        rewrite.diff(decoder).to_html(file)
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_no_page(decoder: nn.Module, tmp_path: Path):
    with pytest.raises(rewrite.RewriteError, match="cannot write the diff"):
        rewrite.diff(decoder).to_html(tmp_path)


def test_picture_draws_the_nodes_of_the_layer(decoder: nn.Module):
    record = rewrite.diff(decoder).graphs[0]
    site, panels = layer(record)
    assert site == "layers.0.self_attn.q_proj"
    assert [p.title for p in panels] == ["captured", "after insert", "after batch, fuse"]
    drawn = [sorted(b.label for b in p.boxes if b.kind in ("operator", "new", "fused")) for p in panels]
    assert drawn[0] == ["linear", "lora", "nf4"]
    assert drawn[1] == ["add", "decode", "linear", "linear", "linear", "mul 2.0"]
    assert drawn[2] == ["adapted_linear", "cat", "getitem 0", "getitem 1", "linear", "split"]
    for panel in panels:
        assert {b.label for b in panel.boxes if b.kind == "adapter"} >= {"lora_A", "lora_B"}
        assert {b.label for b in panel.boxes if b.kind == "weight"} == {"weight0", "weight1"}
        assert "self_attn" in {b.label for b in panel.boxes if b.kind == "output"}


def test_picture_boxes_do_not_overlap(decoder: nn.Module):
    for panel in layer(rewrite.diff(decoder).graphs[0])[1]:
        for i, a in enumerate(panel.boxes):
            assert 0 <= a.x - a.width / 2
            assert a.x + a.width / 2 <= panel.width
            assert a.y + a.height / 2 <= panel.height
            for b in panel.boxes[i + 1 :]:
                apart = abs(a.x - b.x) >= (a.width + b.width) / 2, abs(a.y - b.y) >= (a.height + b.height) / 2
                assert any(apart), (a, b)


def test_llama_of_transformers():
    spec = "lora(r=4)@attn.q,v + nf4(base)"
    model = rewrite.compile(build("llama", torch.float32), spec, backend="eager")
    model(**batch("llama"))
    (record,) = rewrite.diff(model).graphs
    inserted = sorted(e.site for e in record.edits if e.rule == "insert")
    assert inserted == sorted(row["site"] for row in rewrite.plan(build("llama"), spec).rows())
    text = str(rewrite.diff(model))
    assert "@@ fuse_branch x4 at model.layers.[0-1].self_attn.[q_proj,v_proj] @@" in text
    assert max(map(len, text.splitlines())) < 200
    assert record.inputs == ("input_ids int64[2, 9]",)


def test_listing_is_read_back(decoder: nn.Module):
    record = rewrite.diff(decoder).graphs[0]
    for text, count in ((record.before, record.nodes_before), (record.after, record.nodes_after)):
        inputs, nodes = read(text)
        assert len(inputs) + len(nodes) == count - 1  # the output is no node of a listing
        known = {**inputs, **{n.name: n.type for n in nodes}}
        assert len(known) == count - 1
        assert all("".join(part for _, part in tokens(n.text)) == n.text for n in nodes)
        assert all(references(n.text, known) for n in nodes if n.rule)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = linear(x, layers_0_q_adapters_lora_A)", "y = linear(x, lora_A)"),
        ("y = linear(x, layers_0_q_parametrizations_weight_original0)", "y = linear(x, weight0)"),
        ("y = linear(x, layers_0_v_adapters_lora_A)", "y = linear(x, v_lora_A)"),
        ("y = layers_0_q_(x, 'layers_0_q_weight')", "y = layers_0_q_(x, 'layers_0_q_weight')"),
    ],
)
def test_names_are_relative_to_their_site(text: str, expected: str):
    assert short(text, "layers.0.q") == expected


def test_sites_of_a_group():
    assert expand("a.b.[q,v]") == ["a.b.q", "a.b.v"]
    assert expand("a.b.q") == ["a.b.q"]
    assert expand("a.b; c") == ["a.b", "c"]
