"""rewrite: a PEFT compiler for PyTorch.  One string says what to adapt and how.

model = rewrite.compile(model, spec="lora(r=8)@attn.q,v + nf4(base)")
"""

from rewrite.api import apply, attach, compile, load, load_peft, methods, parse, plan, save, save_peft, sites
from rewrite.coupling import coupled
from rewrite.diff import diff
from rewrite.errors import Error, ResolveError, RewriteError, SpecError
from rewrite.explain import explain
from rewrite.report import report
from rewrite.runtime.attach import remove
from rewrite.runtime.calibration import calibrate
from rewrite.runtime.merge import merge
from rewrite.runtime.optimizers import optimizer
from rewrite.runtime.switching import in_use, use
from rewrite.runtime.training import parameter_groups, regulariser, step, trainer_callback
from rewrite.version import __version__

__all__ = [
    "Error",
    "ResolveError",
    "RewriteError",
    "SpecError",
    "__version__",
    "apply",
    "attach",
    "calibrate",
    "compile",
    "coupled",
    "diff",
    "explain",
    "in_use",
    "load",
    "load_peft",
    "merge",
    "methods",
    "optimizer",
    "parameter_groups",
    "parse",
    "plan",
    "regulariser",
    "remove",
    "report",
    "save",
    "save_peft",
    "sites",
    "step",
    "trainer_callback",
    "use",
]
