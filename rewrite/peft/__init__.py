"""Hugging Face PEFT's adapters, in and out: configurations as specs, checkpoints, and tensors under PEFT's names.

In processing order: `config` (fields, read without peft), `targets` (PEFT's rules of matching names), `terms` (paths as
terms of a spec), `tuner` and `tuners/` (one small file per PEFT method), `translate` (configuration -> spec), `keys`
(tensors <-> names in a file), `reading` (folder -> model), `writing` (model -> folder).

Where PEFT 0.21 is wrong, an adapter is loaded as the function that PEFT's forward computes, for that is what was
trained, with the gradients of that function; and refused where no spec says it:

- `nn.MultiheadAttention`: its forward adds the update of `out_proj` twice, its gradient knows one (alpha doubles)
- C3A passes a wrong gradient to its input; LoHa has one for `use_effective_conv2d`
- convolutions: LoRA ignores dilation, groups and padding modes, OFT, BOFT and HRA take the first of stride, padding and
  kernel for all, OFT merges kernels wrongly, LoKr multiplies wrongly in 1-d (refused; DoRA with groups too)
- a tied weight: modules_to_save trains a copy for one of the two (refused), merging changes both (asked for by `untie`)
- `out_proj` of an attention by itself, weights that a parent reads: its adapter does nothing there (refused)
- trained rows of a linear layer drop its bias (refused); the rank of AdaLoRA trains, and is in no file
"""

from rewrite.peft.keys import AsInPeft, named_parameters
from rewrite.peft.reading import load
from rewrite.peft.translate import from_config
from rewrite.peft.writing import save

__all__ = ["AsInPeft", "from_config", "load", "named_parameters", "save"]
