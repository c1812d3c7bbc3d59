"""The version of rewrite, stated once: packaging and `rewrite --version` both read it here."""

__version__ = "0.1.0"
