"""Where generated sources and compiled operators are kept between processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder(kind: str) -> Path:
    """The folder for one kind of generated file, made where it does not exist.

    `$REWRITE_CACHE`, or `rewrite` in the user's cache folder; a temporary folder where neither can be written.
    """
    chosen = os.environ.get("REWRITE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rewrite"
    for base in [Path(chosen)] if chosen else [home, Path(tempfile.gettempdir()) / f"rewrite-{os.getuid()}"]:
        place = base / kind
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    return Path(tempfile.mkdtemp(prefix="rewrite-"))
