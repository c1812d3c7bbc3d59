"""Triton kernels behind the fused operators; where none applies, the reference in `codegen` runs.

A kernel is a typed structure (`kernel.py`), whose template in `templates/` becomes a standalone Triton source.  A file
each for a family of kernels; `catalogue.py` finds them all.
"""
