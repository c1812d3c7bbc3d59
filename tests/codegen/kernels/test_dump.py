"""REWRITE_DUMP: every generated source that ran, once, readable and standalone."""

from __future__ import annotations

import torch

from rewrite.codegen.kernels import gradients, interpret, template
from rewrite.codegen.kernels.gradients import LowRankGradients, Split


def test_sources_are_written_with_what_they_take(device, tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITE_DUMP", str(tmp_path))
    dy, h, B = (torch.randn(*s, device=device).bfloat16() for s in ((70, 40), (70, 3), (40, 3)))
    split = Split(128, 64)
    for _ in range(2):
        gradients.low_rank_gradients(dy, h, B, 2.0, split)
    written = sorted((tmp_path / "kernels").iterdir())
    assert [path.name.rpartition("_")[0] for path in written] == ["low_rank_gradients", "sum_of_parts"]
    text = written[0].read_text()
    kernel = gradients.kernel_of(dy, h, B, split)
    assert isinstance(kernel, LowRankGradients)
    heading, _, source = text.partition("\n\n")
    assert heading.startswith(f"# {kernel!r}\n# BLOCK_M=64, 8 warps, 3 stages\n# ")
    assert interpret.active() == ("interpreted" in heading)
    assert interpret.active() != (" spills, " in heading)
    assert source == kernel.source
    assert template.load("dumped", source).kernel is not None  # standalone: it imports Triton alone
    assert {line for line in source.splitlines() if "import" in line} == {
        "import triton",
        "import triton.language as tl",
    }
