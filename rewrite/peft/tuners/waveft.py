"""WAVEFT: the places follow from the seed; the wavelet is Haar's."""

from __future__ import annotations

from rewrite.peft.tuner import Tuner, table


class WaveftTuner(Tuner):
    """A few wavelet coefficients."""

    type = "WAVEFT"
    methods = ("waveft",)
    transposed = True
    arguments = table(
        {
            "n": ("n_frequency", 2592),
            "scale": ("scaling", 25.0),
            "idwt": ("use_idwt", True),
            "seed": ("random_loc_seed", 777),
        }
    )
    patterns = table({"n_frequency": "n_frequency_pattern"})
    starts = frozenset({"init_weights", "fan_in_fan_out"})
    only = table(
        {
            "wavelet_family": (("db1", "haar"), "rewrite has Haar's wavelet, db1"),
            "proportional_parameters": (
                (),
                "it gives every layer another number of coefficients: write n_frequency_pattern",
            ),
        }
    )
    bias_only = "waveft_only"
    tensors = table({"c": "waveft_spectrum"})
