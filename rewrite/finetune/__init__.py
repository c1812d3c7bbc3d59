"""The main job: a base model, text and a spec in; a trained, checked adapter out.

In processing order: `request` (what is asked, and whether it can be done), `corpus` (text to blocks), `bases` (models),
`training` (the loop), `checks` (one function in all its forms?), `job` (all of it).  Nothing here knows how adapters
work: it uses the public functions only.
"""

from rewrite.finetune.job import Result, finetune
from rewrite.finetune.request import DEFAULT_SPEC, Job

__all__ = ["DEFAULT_SPEC", "Job", "Result", "finetune"]
