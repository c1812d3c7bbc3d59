"""S2FT: some heads and channels of every layer are trained, as the columns of the weights that read them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from rewrite.codegen.forms import Columns, Form, OutputRows, Places, Run
from rewrite.method import Method, Param, Tensor, arg
from rewrite.sites import Site

if TYPE_CHECKING:
    from rewrite.runtime.calibration import Seen

ALIGNMENT = 16
"""Where a run of channels may end: so what stands behind it begins at an aligned address."""


@dataclass(frozen=True)
class S2ft(Method):
    """y + D x_at, `at` some heads of attn.o or channels of ffn.down; D = 0 at the start  (Yang et al. 2024)

    `by=random` takes a run of neighbours, the same one in every layer: the order of heads and of channels says
    nothing, and a run is cut out of the base product, so that a step costs no more than the frozen base and the
    gradient of the slice.  Other choices are scattered, and add D to the base product.
    """

    heads: int = arg(2, low=1, help="heads of every attention, where a site has heads")
    channels: int = arg(220, low=1, help="channels of every other site; all, where it has fewer")
    by: str = arg(
        "random", choices=("random", "weight", "activation", "gradient"), help="what scores a head or channel"
    )
    take: str = arg("large", choices=("large", "small"), help="which scores are chosen")
    seed: int = arg(0, low=0, help="of by=random")

    default_sites = "attn.o,ffn.down"
    paper = "https://arxiv.org/abs/2412.06289"

    @property
    def calibration(self) -> Literal["scales", "gradients"] | None:  # type: ignore[override]
        """What scores are computed from: `rewrite.calibrate` chooses anew, and D starts at 0 again."""
        return "scales" if self.by == "activation" else "gradients" if self.by == "gradient" else None

    def fits(self, site: Site) -> str | None:
        if site.roles[0] in ("attn.qkv", "cross.qkv", "ffn.gate_up"):
            return "its rows are several projections in one: name the parts, e.g. attn.q"
        if site.roles[0].startswith(("attn.", "cross.")):
            if site.head is None:
                return "how many heads it has is not known: no forward of this model was recorded"
            total = width(site) // site.head
            if total * site.head != width(site):
                return f"its {width(site)} channels are no whole heads of {site.head}"
            if self.heads > total:
                return f"heads={self.heads}, and it has {total}"
        if self.by == "activation" and trains_rows(site):
            return "by=activation scores inputs, and output rows are trained here: use by=weight or by=gradient"
        return None

    def note(self, site: Site) -> str | None:
        if trains_rows(site):
            return "s2ft trains output rows here, whose gradient reads the whole input: it saves no activation"
        if self.by != "random":
            return f"by={self.by} chooses scattered columns: their update is added to the base product"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        unit = "head" if site.head else "channel"
        k = min(self.heads * site.head if site.head else self.channels, width(site))
        shape = (k, site.in_features) if trains_rows(site) else (site.out_features, k)
        held = {f"{unit}_{'rows' if trains_rows(site) else 'columns'}": Param(shape)}
        if self.by != "random":
            held["at"] = Param((k,), lambda at: at.copy_(torch.arange(len(at))), trainable=False, dtype=torch.int32)
        return held

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        if self.by != "random":  # from data: until then by weight
            self.choose(W.abs(), theta)

    def calibrated(self, W: Tensor, theta: dict[str, Tensor], seen: Seen) -> None:
        if seen.gradient is not None:
            self.choose(seen.gradient.abs(), theta)
        elif seen.squares is not None:
            self.choose((seen.squares / seen.count).sqrt().expand_as(W), theta)

    def choose(self, scores: Tensor, theta: dict[str, Tensor]) -> None:
        """Put `at` where a matrix of scores (d_out, d_in) is largest or smallest, summed over a head or channel."""
        (name, values), at = next(iter(theta.items())), theta["at"]
        rows = name.endswith("rows")
        total = scores.double().sum(-1 if rows else -2)
        size = len(at) // self.heads if name.startswith("head") else 1
        units = total.unflatten(0, (-1, size)).sum(-1)
        order = units.sort(descending=self.take == "large", stable=True).indices
        chosen = order[: len(at) // size].sort().values
        at.copy_((chosen[:, None] * size + torch.arange(size, device=chosen.device)).flatten())
        values.zero_()

    def delta(self, shape: tuple[int, int], at: Any = None, **held: Any) -> Form:
        ((name, values),) = held.items()
        rows = name.endswith("rows")
        whole, k = (shape[0], values.shape[-2]) if rows else (shape[1], values.shape[-1])
        where = self.run(k, whole, name.startswith("head")) if at is None else Places(at, whole)
        return OutputRows(values, where) if rows else Columns(values, where)

    def run(self, k: int, whole: int, heads: bool) -> Run:
        """The neighbours that by=random takes of so many: whole heads, or channels up to an aligned one."""
        step = k // self.heads if heads else ALIGNMENT
        stops = [n for n in range(k, whole + 1) if n % step == 0] or [whole]
        stop = random.Random(self.seed).choice(stops)  # no tensor: it is asked while a graph is made
        return Run(stop - k, stop, whole)


def trains_rows(site: Site) -> bool:
    """Whether the heads or channels of a site are its outputs: those of a projection that reads the stream."""
    return site.roles[0].removeprefix("cross.").removeprefix("attn.") in ("q", "k", "v") or site.roles[0] in (
        "ffn.up",
        "ffn.gate",
    )


def width(site: Site) -> int:
    """How many channels the heads or channels of a site are chosen from."""
    return site.out_features if trains_rows(site) else site.in_features
