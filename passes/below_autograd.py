"""below_autograd: in Inductor's graphs, forward, backward and inference, our operators without their derivatives."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from rewrite.codegen import below, direct, lowering


class BelowAutograd(CustomGraphPass):
    """op(...)  ->  op.below(...), after `then`, a pass that was asked for besides"""

    def __init__(self, then: Any = None) -> None:
        self.then = then

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            node.target = below.BELOW.get(node.target, node.target)
        for each in self.then if isinstance(self.then, (list, tuple)) else [self.then]:
            if each is not None:
                each(graph)

    def uuid(self) -> Any:
        """Identifies this pass, and how sources that Inductor generates then call our operators, in Inductor's caches.

        None, no caching, where another pass cannot be identified.
        """
        other = getattr(self.then, "uuid", lambda: None)()
        if self.then is not None and other is None:
            return None
        return get_hash_for_files((__file__, direct.__file__, lowering.__file__), repr(other))
