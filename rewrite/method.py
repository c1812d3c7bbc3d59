"""What a PEFT method is: a frozen dataclass whose fields are its spec arguments and whose one view is its maths.

A method states its maths once, by overriding exactly one view:

- `delta(**theta)`            a structured update of the weight (`rewrite.codegen.delta`), e.g. low rank
- `weight(W, **theta)`        any reparameterised weight
- `output(x, y, **theta)`     a branch on a module's input and output
- `encode(W)` / `decode(...)` a storage format of the weight itself
- nothing, with `trains = True`: the base tensors of the site are trained

`rewrite/lower.py` derives forward, merge, saving and cost from that view.  Nothing here touches a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rewrite.codegen import storage
from rewrite.codegen.delta import Delta

if TYPE_CHECKING:
    from rewrite.sites import Site

Tensor = torch.Tensor


def arg(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Mapping[str, type] | tuple[str, ...] | None = None,
    help: str = "",
) -> Any:
    """A dataclass field that is also a spec argument.

    `low <= value <= high`, `above < value < below`.  `choices` is a tuple of names (`scale=rs`), or a
    mapping name -> dataclass for values with arguments of their own (`init=pissa(niter=4)`).

    >>> r: int = arg(8, low=1, help="rank")
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"limits": limits, "choices": choices, "help": help})


@dataclasses.dataclass(frozen=True)
class Param:
    """One tensor of a method at a site: shape, how it starts, and whether it trains.

    `init` fills an empty tensor in place (as `torch.nn.init` functions do).
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any] = torch.nn.init.zeros_
    trainable: bool = True


def kaiming(tensor: Tensor) -> Tensor:
    """Uniform in +-1/sqrt(d_in), as `torch.nn.Linear` starts its weight (He et al. 2015, a = sqrt 5).

    The tensor is (..., d_in): leading dimensions stack matrices, they are no part of the fan.
    """
    torch.nn.init.kaiming_uniform_(tensor.flatten(0, -2), a=math.sqrt(5))
    return tensor


class Method:
    """Base class of every method; subclasses are frozen dataclasses in `rewrite/methods/`, found by discovery.

    Class attributes: `name` (of the spec; default the class name in lower case), `kinds` (what it can be
    placed on: linear, norm, embedding, ...), `positional_sites` (`nf4(base)`), `default_sites`, `paper`.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    positional_sites: ClassVar[bool] = False
    default_sites: ClassVar[str | None] = None
    identity: ClassVar[bool] = True  # changes the function by nothing at step 0
    trains: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__name__.lower())

    def params(self, site: Site) -> dict[str, Param]:
        """The method's tensors at a site with the matrix (*stack, out_features, in_features), in a fixed order."""
        return {}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        """Fill `theta` in place where the start depends on the matrix W (..., d_out, d_in); after `Param.init`."""

    def fits(self, site: Site) -> str | None:
        """Why this method cannot stand at a site, or None."""
        return None

    def delta(self, **theta: Any) -> Delta:
        """A structured update of the weight."""
        raise NotImplementedError

    def weight(self, W: Tensor, **theta: Tensor) -> Tensor:
        """The reparameterised matrix W (..., d_out, d_in) of a weight."""
        raise NotImplementedError

    def output(self, x: Tensor, y: Tensor, **theta: Tensor) -> Tensor:
        """The changed output of a module with input x and output y."""
        raise NotImplementedError

    def encode(self, W: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors of the matrix W (..., d_out, d_in) of a weight."""
        raise NotImplementedError

    def layout(self, site: Site) -> storage.Layout:
        """How the stored tensors at a site decode."""
        raise NotImplementedError

    def read(self, state: Mapping[str, Any], name: str) -> tuple[Tensor, ...] | None:
        """The stored tensors of the weight `name` in another library's checkpoint; None if it is not one."""
        return None

    def view(self) -> str:
        """The one view that this method states: delta, weight, output, storage or train."""
        if self.trains:
            return "train"
        stated = [
            v for v in ("delta", "weight", "output", "encode") if getattr(type(self), v) is not getattr(Method, v)
        ]
        if len(stated) != 1:
            raise TypeError(f"method {self.name} must state exactly one view, it states {stated or 'none'}")
        return "storage" if stated == ["encode"] else stated[0]


def refusal(method: Method, site: Site) -> str | None:
    """Why a method cannot stand at a site, or None: its own reason, or one that follows from its view there."""
    if (reason := method.fits(site)) is not None:
        return reason
    dropout, view = getattr(method, "dropout", 0.0), method.view()
    if site.place.map.reads_ids and view == "delta" and dropout:
        return "dropout drops activations, and this layer reads ids: set dropout=0 there"
    if site.place.called:
        return None
    if view == "output":
        return "it changes the output of a layer, and this weight is read without calling one"
    if view == "delta" and dropout:
        return "dropout drops inputs of a layer, and this weight is read without calling one: set dropout=0 there"
    if view == "delta" and _shift(method, site):
        return "it shifts the output of a layer, and this weight is read without calling one"
    return None


def _shift(method: Method, site: Site) -> bool:
    """Whether a method updates the bias too."""
    theta = {name: torch.empty(p.shape, device="meta") for name, p in method.params(site).items()}
    return method.delta(**theta).shift() is not None
