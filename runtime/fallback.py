"""Notices when a compiled model runs in eager after all: Dynamo falls back with no more than a log line.

A compiled call marks itself active; an adapter that then runs outside of any compiled graph reports it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)
_active = threading.local()


class Calls:
    """How often a compiled model was called, and in how many of the calls an adapter ran in eager."""

    def __init__(self) -> None:
        self.total = self.eager = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """One compiled call."""
        before, _active.calls, _active.seen = getattr(_active, "calls", None), self, False
        self.total += 1
        try:
            yield
        finally:
            _active.calls = before


def ran_eagerly() -> None:
    """An adapter runs in eager; counts when a compiled call is under way, once per call."""
    calls: Calls | None = getattr(_active, "calls", None)
    if calls is None or _active.seen:
        return
    _active.seen = True
    calls.eager += 1
    if calls.eager == 1:
        log.warning(
            "a compiled model ran in eager: Dynamo fell back (recompile limit, graph break or compilation "
            "disabled). The result is right, the speed is not; TORCH_LOGS=recompiles,graph_breaks tells why."
        )
