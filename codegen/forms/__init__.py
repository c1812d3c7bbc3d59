"""Structured matrices: what updates of weights, and factors of them, are made of.  `form` explains the algebra."""

from rewrite.codegen.forms.base import Base
from rewrite.codegen.forms.form import (
    IN,
    OUT,
    TOKENS,
    Dense,
    Diagonal,
    Form,
    Formed,
    Product,
    Scaled,
    Shift,
    Spread,
    Sum,
)
from rewrite.codegen.forms.low_rank import LowRank

__all__ = [
    "IN",
    "OUT",
    "TOKENS",
    "Base",
    "Dense",
    "Diagonal",
    "Form",
    "Formed",
    "LowRank",
    "Product",
    "Scaled",
    "Shift",
    "Spread",
    "Sum",
]
