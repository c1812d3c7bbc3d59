"""Progress of a step whose length nobody knows, such as a compilation: its bar shows the time that passes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_DELAY = 2.0  # seconds before a bar appears at all
_EVERY = {True: 1.0, False: 15.0}  # seconds between two showings, on a terminal and in a log


@contextlib.contextmanager
def ticking(bar: Any) -> Iterator[None]:
    """Show a tqdm bar anew from time to time while the block runs, from its third second on."""
    stop = threading.Event()

    def show() -> None:
        wait = _DELAY
        while not stop.wait(wait):
            bar.refresh()
            wait = _EVERY[bar.fp.isatty()]

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """`what` and the time that passes, while the block runs.

    Example: `with waiting("load the model"): model = load(folder)`
    """
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", delay=_DELAY, leave=False) as bar, ticking(bar):
        yield
