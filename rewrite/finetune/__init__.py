"""The main job: a base model, text and a spec in; a trained, checked adapter out.

Order of the files: `corpus` reads text, `bases` builds or loads models, `training` is the loop, `checks` compares
logits, `request` finds what cannot be done, `job` puts them together.  Nothing here knows how adapters work: it uses the public functions only.
"""

from rewrite.finetune.job import Result, finetune
from rewrite.finetune.request import DEFAULT_SPEC, Job

__all__ = ["DEFAULT_SPEC", "Job", "Result", "finetune"]
