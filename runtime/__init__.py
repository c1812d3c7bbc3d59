"""Grafts on a model, capture, the `torch.compile` backend, save, load and merge.

All that this floor knows about an adapter is its graft; it never sees a spec, a site, a method or a plan.
"""

if __name__ != "rewrite.runtime":
    raise ImportError("import rewrite.runtime, not runtime")
