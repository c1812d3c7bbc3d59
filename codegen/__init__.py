"""Typed operations (reference, cost, fake, backward) and the kernels behind them.

The lowest floor: it imports nothing of rewrite but the error classes, and knows no graph and no model.
"""

if __name__ != "rewrite.codegen":
    raise ImportError("import rewrite.codegen, not codegen")
