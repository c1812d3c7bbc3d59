"""FX graph -> FX graph: patterns, rules and the pipeline that runs them.

Passes see typed nodes and operators only; they never see a spec, a site, a method or a plan.
"""

if __name__ != "rewrite.passes":
    raise ImportError("import rewrite.passes, not passes")
