"""One file per PEFT tuner.  A file here that defines a `Tuner` is found by itself: no list to edit."""
