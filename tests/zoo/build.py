"""Tiny random models of the architectures that transformers ships, each with a batch: the zoo.

    cases("causal")                     every causal language model
    python -m tests.zoo.build [kind ...]   prints which build, run forward and backward, and how long each takes

Models come from their configuration classes alone; nothing is downloaded. Sizes are in tests/zoo/sizes.py, what single
architectures need in tests/zoo/overrides.py.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo.batches import Batch, batch_of, loss_of
from tests.zoo.overrides import NEEDS_TRAINING, OVERRIDES, SKIPPED
from tests.zoo.sizes import fields, sized

# Kind -> the mappings of transformers that hold it; a model type that several of them hold is built once.
KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(f"MODEL_FOR_{name}_MAPPING_NAMES" for name in names.split())
    for kind, names in {
        "causal": "CAUSAL_LM",
        "encoder": "MASKED_LM",
        "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
        "vision": "IMAGE_CLASSIFICATION BACKBONE VIDEO_CLASSIFICATION DEPTH_ESTIMATION SEMANTIC_SEGMENTATION "
        "OBJECT_DETECTION UNIVERSAL_SEGMENTATION",
        "audio": "AUDIO_CLASSIFICATION CTC SPEECH_SEQ_2_SEQ",
        "multimodal": "ZERO_SHOT_IMAGE_CLASSIFICATION VISUAL_QUESTION_ANSWERING IMAGE_TEXT_TO_TEXT",
    }.items()
}


@dataclass(frozen=True)
class Case:
    """An architecture of the zoo; `cls` is the name of the model's class in transformers."""

    name: str
    kind: str
    cls: str
    skip: str | None = None

    def build(self) -> nn.Module:
        """The model: seeded, in float32 and in eval mode, if it can be differentiated in that."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.cls)
        return cls(self.config(cls)).float().train(self.name in NEEDS_TRAINING)

    def config(self, cls: type) -> Any:
        """A small configuration for the class: composite, or of the part that the class models."""
        overrides = OVERRIDES.get(self.name, {}) | OVERRIDES.get(f"{self.kind}/{self.name}", {})
        if "is_decoder" in fields(CONFIG_MAPPING[self.name]):
            overrides = {"is_decoder": self.kind == "causal"} | overrides
        config = sized(CONFIG_MAPPING[self.name], overrides)
        parts = [getattr(config, name) for name in config.sub_configs]
        return next((each for each in (config, *parts) if isinstance(each, cls.config_class)), config)

    def batch(self, model: nn.Module) -> Batch:
        """The keyword arguments of `model`, with labels where these make it give a loss."""
        return batch_of(self.name, self.kind, model)

    def loss(self, output: Any) -> Tensor:
        """The loss in the output of `model(**batch)`, or a number that depends on all of the output."""
        return loss_of(output)


def cases(kind: str) -> list[Case]:
    """All architectures of a kind, in the order in which transformers lists them; `skip` says why one is left out."""
    found: dict[str, Case] = {}
    for mapping in KINDS[kind]:
        for name, cls in getattr(modeling_auto, mapping).items():
            cls = cls if isinstance(cls, str) else cls[0]
            reason = SKIPPED.get(f"{kind}/{name}", SKIPPED.get(name))
            found.setdefault(name, Case(name, kind, cls, reason))
    return list(found.values())


@dataclass
class Trial:
    """How far an architecture came."""

    case: Case
    reached: str = "nothing"  # then "build", "run", "backward"; "skipped"
    seconds: float = 0.0
    reason: str = ""


def attempt(case: Case) -> Trial:
    """Build a model, run it and differentiate it."""
    trial, start = Trial(case), time.perf_counter()
    try:
        model = case.build()
        trial.reached = "build"
        loss = case.loss(model(**case.batch(model)))
        trial.reached = "run"
        loss.backward()
        if not any(each.grad is not None and each.grad.any() for each in model.parameters()):
            raise RuntimeError("no gradient")
        trial.reached = "backward"
    except Exception as error:
        trial.reason = f"{type(error).__name__}: {error}"
    trial.seconds = time.perf_counter() - start
    return trial


def row(trial: Trial) -> str:
    reason = " ".join((trial.reason or trial.case.skip or "").split())[:160]
    return f"{trial.case.kind:16}{trial.case.name:32}{trial.reached:10}{trial.seconds:6.1f} s  {reason}"


def main(kinds: list[str]) -> None:
    """Print a line for every architecture, and the counts."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
    for kind in kinds or list(KINDS):
        counts = {"backward": 0, "failed": 0, "skipped": 0}
        for case in cases(kind):
            trial = Trial(case, "skipped") if case.skip else attempt(case)
            print(row(trial), flush=True)
            counts[trial.reached if trial.reached in counts else "failed"] += 1
        print(f"{kind}: {counts['backward']} pass, {counts['failed']} fail, {counts['skipped']} skipped\n")


if __name__ == "__main__":
    main(sys.argv[1:])
