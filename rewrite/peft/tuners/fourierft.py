"""FOURIERFT: the places follow from the seed."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner, table


class FourierftTuner(Tuner):
    """A few entries of a spectrum."""

    type = "FOURIERFT"
    methods = ("fourierft",)
    transposed = True
    arguments = table({"n": ("n_frequency", 1000), "scale": ("scaling", 150.0), "seed": ("random_loc_seed", 777)})
    patterns = table({"n_frequency": "n_frequency_pattern"})
    dotted = True
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    bias_only = "fourier_only"
    tensors = table({"c": "fourierft_spectrum"})
