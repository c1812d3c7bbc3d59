"""Structured matrices: what updates of weights, and factors of them, are made of.  `form` explains the algebra."""

from rewrite.codegen.forms.algebra import Product, Scaled, Spread, Sum
from rewrite.codegen.forms.base import Base
from rewrite.codegen.forms.block_diagonal import BlockDiagonal
from rewrite.codegen.forms.blocks import LowRankBlocks, Tiled
from rewrite.codegen.forms.butterfly import Butterfly
from rewrite.codegen.forms.circulant import Circulant
from rewrite.codegen.forms.codebook import Codebook
from rewrite.codegen.forms.form import IN, OUT, TOKENS, Dense, Diagonal, Form, Formed, Shift
from rewrite.codegen.forms.hadamard import Hadamard
from rewrite.codegen.forms.householder import Householder
from rewrite.codegen.forms.kronecker import Kronecker
from rewrite.codegen.forms.low_rank import LowRank, spread_over
from rewrite.codegen.forms.orthogonal import cayley, cayley_neumann, skew
from rewrite.codegen.forms.pairs import Pairs
from rewrite.codegen.forms.slices import Columns, OutputRows, Places, Run
from rewrite.codegen.forms.sparse import Coordinates, RowSparse, scattered
from rewrite.codegen.forms.spectral import Fourier, Haar
from rewrite.codegen.forms.transforms import Cosine, Walsh

__all__ = [
    "IN",
    "OUT",
    "TOKENS",
    "Base",
    "BlockDiagonal",
    "Butterfly",
    "Circulant",
    "Codebook",
    "Columns",
    "Coordinates",
    "Cosine",
    "Dense",
    "Diagonal",
    "Form",
    "Formed",
    "Fourier",
    "Haar",
    "Hadamard",
    "Householder",
    "Kronecker",
    "LowRank",
    "LowRankBlocks",
    "OutputRows",
    "Pairs",
    "Places",
    "Product",
    "RowSparse",
    "Run",
    "Scaled",
    "Shift",
    "Spread",
    "Sum",
    "Tiled",
    "Walsh",
    "cayley",
    "cayley_neumann",
    "scattered",
    "skew",
    "spread_over",
]
