"""Hugging Face PEFT's adapters, in and out: configurations as specs, checkpoints, and tensors under PEFT's names.

In processing order: `config` (fields, read without peft), `targets` (PEFT's rules of matching names), `terms` (paths as
terms of a spec), `tuner` and `tuners/` (one small file per PEFT method), `translate` (configuration -> spec), `keys`
(tensors <-> names in a file), `reading` (folder -> model), `writing` (model -> folder).

Where PEFT 0.21 computes something else than it trained or merges, what it computes in a forward is what is loaded, and
an adapter that has no such meaning is refused; `docs/peft.md` lists the cases.
"""

from rewrite.peft.keys import AsInPeft, named_parameters
from rewrite.peft.reading import load
from rewrite.peft.translate import from_config
from rewrite.peft.writing import save

__all__ = ["AsInPeft", "from_config", "load", "named_parameters", "save"]
