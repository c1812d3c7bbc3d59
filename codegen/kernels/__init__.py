"""Kernels behind the fused operators, one file each; where none applies, the reference in `codegen.ops` runs."""
