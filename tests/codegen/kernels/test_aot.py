"""Every kernel and every configuration compiled for GPUs that are not here, by both versions of Triton."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewrite.codegen.kernels import aot, catalogue
from rewrite.codegen.kernels.kernel import Config
from rewrite.codegen.kernels.nf4 import Nf4Dequantise
from rewrite.codegen.kernels.target import SM80, SM90, TARGETS

ROOT = Path(__file__).resolve().parents[3]
VERSIONS = ("3.6.0", "3.7.1")


@pytest.fixture(scope="module", params=VERSIONS)
def compiled(request, tmp_path_factory):
    """What `rewrite kernels --check` found with one version of Triton."""
    beside = Path(sys.prefix) / f"triton-{request.param}"
    paths = [str(ROOT)]
    if importlib.metadata.version("triton") != request.param:
        if not beside.is_dir():
            pytest.fail(f"Triton {request.param} is not at {beside}: tools/environment.py puts it there")
        paths.insert(0, str(beside))
    out = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.check_output(version, env=environment, text=True).strip() == request.param
    check = [sys.executable, "-m", "rewrite", "kernels", "--check", "--json", str(out)]
    done = subprocess.run(check, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.aot
def test_every_configuration_compiles_without_a_complaint(compiled):
    wanted = [(k.name, repr(k), t.name) for t in TARGETS.values() for k, _ in catalogue.launches(t)]
    assert [(c["kernel"], c["structure"], c["target"]) for c in compiled] == wanted
    assert {c["kernel"] for c in compiled} == {k.name for k in catalogue.examples()}
    assert {c["target"] for c in compiled} == {"sm_80", "sm_90"}
    assert [c for c in compiled if c["complaints"] or c["error"] or not c["registers"]] == []


@pytest.mark.aot
def test_what_is_rounded_one_by_one_is_not_contracted(compiled):
    exact = [c for c in compiled if not c["fp_fusion"]]
    assert any(c["kernel"] == "nf4_dequantise" for c in exact)
    assert [c for c in exact if c["fused"]] == []


def test_every_kernel_has_a_legal_configuration():
    for target in TARGETS.values():
        assert all(kernel.configs(target) for kernel in catalogue.examples())


def test_complaints():
    class Product(Nf4Dequantise):
        products = True

    kernel, config = Product(64, 64, False, None), Config.of(BLOCK_M=64)
    fine = aot.Resources(registers=32, products=8)
    assert aot.complaints(kernel, config, SM90, fine) == []
    assert aot.complaints(kernel, Config.of(BLOCK_M=16), SM90, aot.Resources(registers=32)) == []
    found = aot.Resources(registers=255, spills=24, shared=200_000, fused=2)
    assert aot.complaints(kernel, config, SM80, found) == [
        "spills 24 bytes of registers",
        "needs 200,000 bytes of shared memory, sm_80 has 166,912",
        "no tensor-core instruction at BLOCK_M=64",
        "contracts 2 products and sums that must be rounded one by one",
    ]
    assert aot.complaints(kernel, config, SM80, aot.Resources(error="OutOfMemory")) == ["does not compile: OutOfMemory"]
