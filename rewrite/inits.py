"""How the factors of a low-rank update start: values of `init=` of `lora` and what derives from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from rewrite.codegen import nf4
from rewrite.method import Tensor, arg

if TYPE_CHECKING:
    from rewrite.runtime.calibration import Seen


@dataclass(frozen=True)
class Init:
    """How A and B start.

    `residual`: they start away from zero, and the frozen A0, B0, equal to them at first, take that off again.
    `calibration`: what they want to see of the data; until then they start as kaiming.
    """

    residual: ClassVar[bool] = False
    identity: ClassVar[bool] = True  # the update is zero at first, or taken off again
    calibration: ClassVar[Literal["inputs", "gradients"] | None] = None
    needs_storage: ClassVar[bool] = False

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        """Fill A (..., r, d_in) and B (..., d_out, r) in place; W (..., d_out, d_in) is in the dtype of A."""

    def calibrated(self, W: Tensor, A: Tensor, B: Tensor, scale: float, seen: Seen) -> None:
        """Fill A and B in place from what a site saw."""

    def refuses(self, rank: int, limit: int) -> str | None:
        """Why it cannot start factors of that rank for a weight whose own is at most `limit`, or None."""
        if (self.residual or self.calibration) and rank > limit:
            return (
                f"r={rank} is more than the rank {limit} of its weight, which init={type(self).__name__.lower()} needs"
            )
        return None


@dataclass(frozen=True)
class Kaiming(Init):
    """A uniform in +-1/sqrt(d_in), B = 0  (the reference code of Hu et al. 2021); of an embedding A = 0, B normal."""


@dataclass(frozen=True)
class Gaussian(Init):
    """A normal with deviation 1/r, B = 0."""

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        A.normal_(std=1 / A.shape[-2])


@dataclass(frozen=True)
class Orthogonal(Init):
    """A = Q1' N / 10, B = N' Q2 / 10 with orthogonal rows Q1, Q2, so that B A = 0 while neither is  (Jain 2024)."""

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        rank = A.shape[-2]
        stack = A.shape[:-2]
        Q, _ = torch.linalg.qr(torch.randn(*stack, rank, rank, dtype=A.dtype, device=A.device))
        left, right = (
            torch.randn(*stack, n, rank // 2, dtype=A.dtype, device=A.device) for n in (B.shape[-2], A.shape[-1])
        )
        A.copy_((right @ Q[..., 0::2, :]).mT / 10)
        B.copy_(left @ Q[..., 1::2, :] / 10)

    def refuses(self, rank: int, limit: int) -> str | None:
        return f"init=orthogonal needs an even rank, this is r={rank}" if rank % 2 else None


@dataclass(frozen=True)
class Pissa(Init):
    """Principal singular vectors: B A = (the r largest singular triples of W) / scale  (Meng et al. 2024)."""

    niter: int | None = arg(None, low=1, help="subspace iterations of a randomised SVD; none is the exact SVD")
    residual = True

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        r = A.shape[-2]
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, q=r, niter=self.niter)
            Vh = V.mT
        _split(U[..., :r], S[..., :r] / scale, Vh[..., :r, :], A, B)


@dataclass(frozen=True)
class Olora(Init):
    """The leading part of W = Q R: B = Q[:, :r], A = R[:r]  (Buyukakyuz 2024)."""

    residual = True

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        Q, R = torch.linalg.qr(W)
        A.copy_(R[..., : A.shape[-2], :])
        B.copy_(Q[..., : A.shape[-2]])


@dataclass(frozen=True)
class Loftq(Init):
    """B A = (the r largest singular triples of W - nf4(W)) / scale: what rounding took of the base  (Li et al. 2023)

    One alternation: with more, the base would have to be stored as the rounding of another matrix than itself.
    """

    needs_storage = True
    identity = False  # nearer to the model before rounding than the rounded base is

    def fill(self, W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        codes, absmax = nf4.quantize(W.contiguous())
        lost = W - nf4.dequantize(codes, absmax, W.shape, W.dtype)
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        r = A.shape[-2]
        _split(U[..., :r], S[..., :r] / scale, Vh[..., :r, :], A, B)

    def refuses(self, rank: int, limit: int) -> str | None:
        return f"r={rank} is more than the rank {limit} of its weight" if rank > limit else None


@dataclass(frozen=True)
class Eva(Init):
    """A = the r principal directions of the inputs, B = 0  (Paischer et al. 2024), with the same rank everywhere."""

    calibration = "inputs"

    def calibrated(self, W: Tensor, A: Tensor, B: Tensor, scale: float, seen: Seen) -> None:
        assert seen.moment is not None
        assert seen.total is not None
        mean = seen.total / seen.count
        _, vectors = torch.linalg.eigh(seen.moment / seen.count - torch.outer(mean, mean))
        A.copy_(vectors.flip(-1)[:, : A.shape[-2]].t())
        B.zero_()


@dataclass(frozen=True)
class Corda(Init):
    """B A = r singular triples of W C, times C^-1, / scale, for the second moment C of the inputs  (Yang et al. 2024).

    `ipm` takes the largest triples (to learn what the data is), `kpm` the smallest (to keep what it knows).
    """

    mode: Literal["ipm", "kpm"] = arg("ipm", help="largest or smallest singular triples")
    damp: float = arg(0.01, above=0, help="share of the mean diagonal that is added to C before it is inverted")
    residual = True
    calibration = "inputs"

    def calibrated(self, W: Tensor, A: Tensor, B: Tensor, scale: float, seen: Seen) -> None:
        assert seen.moment is not None
        C = seen.moment / seen.count
        C = C + torch.eye(len(C), dtype=C.dtype, device=C.device) * C.diagonal().mean() * self.damp
        U, S, Vh = torch.linalg.svd(W.to(C.dtype) @ C, full_matrices=False)
        r = A.shape[-2]
        part = slice(0, r) if self.mode == "ipm" else slice(len(S) - r, len(S))
        _split(U[:, part], S[part] / scale, torch.linalg.solve(C, Vh[part], left=False), A, B)


@dataclass(frozen=True)
class LoraGa(Init):
    """A, B along singular vectors of the first gradient, so that the first step is that of W  (Wang et al. 2024)."""

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = arg("ArB2r", help="which of the 2r first vectors go to A and to B")
    gamma: float = arg(16.0, above=0, help="gamma of the paper's stable scale")
    residual = True
    calibration = "gradients"

    def calibrated(self, W: Tensor, A: Tensor, B: Tensor, scale: float, seen: Seen) -> None:
        assert seen.gradient is not None
        U, _, Vh = torch.linalg.svd(seen.gradient, full_matrices=False)
        r = A.shape[-2]
        first, second, even, odd = slice(0, r), slice(r, 2 * r), slice(0, 2 * r, 2), slice(1, 2 * r, 2)
        of_A, of_B = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[self.direction]
        A.copy_(Vh[of_A] * W.shape[-2] ** 0.25 / self.gamma**0.5)
        B.copy_(U[:, of_B] * W.shape[-2] ** 0.25 / self.gamma**0.5)

    def refuses(self, rank: int, limit: int) -> str | None:
        return f"init=lora_ga needs 2 r singular vectors, its weight has {limit}" if 2 * rank > limit else None


def _split(U: Tensor, S: Tensor, Vh: Tensor, A: Tensor, B: Tensor) -> None:
    """B A = U S Vh, the singular values shared evenly."""
    root = S.sqrt()
    A.copy_(root[..., :, None] * Vh)
    B.copy_(U * root[..., None, :])


KAIMING = Kaiming()
INITS = {
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": Pissa,
    "olora": Olora,
    "loftq": Loftq,
    "eva": Eva,
    "corda": Corda,
    "lora_ga": LoraGa,
}
