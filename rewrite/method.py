"""What a PEFT method is: a frozen dataclass whose fields are its spec arguments and whose one view is its maths.

A method states its maths once, by overriding exactly one view:

- `delta(**theta)`            a structured update of the weight (`rewrite.codegen.forms`), e.g. low rank
- `weight(W, **theta)`        a rewritten weight, over the weight itself as a form; `shifted(W, b, ...)` is its bias
- `output(x, y, **theta)`     a branch on a module's input and output
- `input(x, **theta)`         a change of a module's input
- `tokens(**theta)`          virtual tokens in front of a model's input; `past(**theta)` keys and values before it
- `tap(h, **theta)`          a side network: what it sees of a block, with `step`, `close` and `join`
- `encode(W)` / `decode(...)` a storage format of the weight itself
- nothing, with `trains`:     base tensors of the site are trained
- nothing, with `policy`:     no site is changed: how the model is trained, what it keeps (`rewrite.regime`)

`rewrite/lower.py` derives forward, merge, saving and cost from that view.  What a method does besides (`schedule`,
`regulariser`, `calibrated`) is driven by `rewrite.step` and its siblings.  Nothing here touches a model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from rewrite.codegen import storage
from rewrite.codegen.forms import Form

if TYPE_CHECKING:
    from rewrite.blocks import Block
    from rewrite.passes.keep import Rule
    from rewrite.runtime.calibration import Seen
    from rewrite.runtime.side import Call
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
    positional: bool = False,
) -> Any:
    """A dataclass field that is also a spec argument.

    `low <= value <= high`, `above < value < below`.  `choices` is a tuple of names (`scale=rs`), or a
    mapping name -> dataclass for values with arguments of their own (`init=pissa(niter=4)`).  A `positional` one is
    written without its name (`save(fp8)`).

    >>> r: int = arg(8, low=1, help="rank")
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"limits": limits, "choices": choices, "help": help, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Param:
    """One tensor of a method at a site: shape, how it starts, and whether it trains.

    `init` fills an empty tensor in place (as `torch.nn.init` functions do).  A `shared` one is one tensor for all sites
    of the clause, as large as the largest of them, of which every site sees its leading part.  `lr` is the factor on
    the learning rate, and without `decay` an optimizer leaves it alone (`rewrite.parameter_groups`).  `dtype` is for
    tensors of whole numbers (indices); the others have that of the base, or float32 where that is smaller.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any] = torch.nn.init.zeros_
    trainable: bool = True
    shared: bool = False
    lr: float = 1.0
    decay: bool = True
    dtype: torch.dtype | None = None


def kaiming(tensor: Tensor) -> Tensor:
    """Uniform in +-1/sqrt(d_in), as `torch.nn.Linear` starts its weight (He et al. 2015, a = sqrt 5).

    The tensor is (..., d_in): leading dimensions stack matrices, they are no part of the fan.
    """
    torch.nn.init.kaiming_uniform_(tensor.flatten(0, -2), a=math.sqrt(5))
    return tensor


class Method:
    """Base class of every method; subclasses are frozen dataclasses in `rewrite/methods/`, found by discovery.

    Class attributes: `name` (of the spec; default the class name, LoraXs is `lora_xs`), `kinds` (what it can be
    placed on: linear, norm, embedding, ...), `positional_sites` (`nf4(base)`), `default_sites`, `paper`.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    positional_sites: ClassVar[bool] = False
    default_sites: ClassVar[str | None] = None
    identity: ClassVar[bool] = True  # changes the function by nothing at step 0
    trains: ClassVar[bool | tuple[str, ...]] = False  # the base tensors of the site: all, or those of these names
    policy: ClassVar[bool] = False  # places nothing: a clause about its sites, or without `kinds` about the whole model
    anywhere: ClassVar[bool] = False  # a policy that is about the whole model where it is written without sites
    pointwise: ClassVar[bool] = False  # `output` or `input` scales and shifts every channel alone, so that it merges
    calibration: ClassVar[Literal["inputs", "scales", "gradients"] | None] = None  # what `calibrated` wants to see
    within_rank: ClassVar[bool] = False  # its argument r is at most the rank of the weight
    reads: ClassVar[bool] = False  # a side network beside a decoder reads the one beside the encoder
    ends: ClassVar[Literal["end", "late", "head"]] = "end"  # of a stack, in front of its last block, behind the head
    through: ClassVar[bool] = False  # a side network sends rows of its own through the layers of the blocks
    needs_storage: ClassVar[bool] = False  # stands only where the weight is stored in another format
    paper: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower())

    @property
    def rounds(self) -> bool:
        """Whether, by this policy, the backward reads rounded copies: gradients are near the exact ones, not equal."""
        return False

    def params(self, site: Site) -> dict[str, Param]:
        """The method's tensors at a site with the matrix (*stack, out_features, in_features), in a fixed order."""
        return {}

    def initialise(self, W: Tensor, theta: dict[str, Tensor]) -> None:
        """Fill `theta` in place where the start depends on the matrix W (..., d_out, d_in); after `Param.init`."""

    def fits(self, site: Site) -> str | None:
        """Why this method cannot stand at a site, or None."""
        return None

    def beside(self, others: Sequence[Method], sites: Sequence[Site]) -> str | None:
        """Why a policy cannot hold for these sites in a spec with these other methods, or None."""
        return None

    def note(self, site: Site) -> str | None:
        """What a user should know about this method at a site, or None; the plan says it once for all alike."""

    def approximation(self, marked: bool) -> str | None:
        """What is approximate about a clause that a leading `~` marks, or does not, or None: only such are marked."""
        return None

    def keeps(self, marked: bool) -> Rule | None:
        """What becomes of the values that a step would save at the sites of a policy; `marked` by a leading `~`."""
        return None

    def delta(self, **theta: Any) -> Form:
        """A structured update of the weight; with a parameter `shape`, it is told (d_out, d_in) too."""
        raise NotImplementedError

    def weight(self, W: Any, **theta: Any) -> Form | Tensor:
        """The rewritten matrix W (..., d_out, d_in) of a weight: forms over `W`, or any function of it as a tensor."""
        raise NotImplementedError

    def shifted(self, W: Any, b: Tensor | None, **theta: Any) -> Tensor | None:
        """The bias that goes with `weight`."""
        return b

    def output(self, x: Tensor, y: Tensor, **theta: Any) -> Tensor:
        """The changed output of a module with input x and output y, channels last."""
        raise NotImplementedError

    def input(self, x: Tensor, **theta: Any) -> Tensor:
        """The changed input of a module, channels last."""
        raise NotImplementedError

    def tokens(self, **theta: Any) -> Tensor:
        """The embeddings (n, width) of virtual tokens.  The first tensor of the method has n rows."""
        raise NotImplementedError

    def past(self, **theta: Any) -> Tensor:
        """Keys and values (n, layers, 2, heads, width) of n tokens that were never there; n rows as in `tokens`."""
        raise NotImplementedError

    def tap(self, h: Tensor, **theta: Tensor) -> Tensor:
        """What a side network sees of a stream h (rows, tokens, width): where a stack begins and behind its blocks.

        It takes the tensors of the site by name, as `join` does, and `params` has them for each `site.part`.
        """
        raise NotImplementedError

    def step(self, s: Any, t: Tensor, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Any:
        """The next state of a side network after tapping t; s is None where the stack begins."""
        raise NotImplementedError

    def close(self, s: Any, call: Call, block: Block, theta: Mapping[str, Tensor]) -> Tensor:
        """What joins the stream at the end of a stack, or is read by the side network of a decoder."""
        return s

    def join(self, y: Tensor, s: Tensor, **theta: Tensor) -> Tensor:
        """The stream y with what a side network found."""
        raise NotImplementedError

    def start(
        self, sites: Sequence[Site], weights: Sequence[Mapping[str, Tensor]], theta: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Fill the tensors of a side network in place from the model's own matrices, by role; after `Param.init`."""

    def regulariser(self, **theta: Any) -> Tensor | None:
        """A term of the loss for one site, or None (`rewrite.regulariser`)."""
        return None

    def schedule(
        self, step: int, sites: Sequence[Mapping[str, Tensor]], memory: dict[Any, Any]
    ) -> Iterable[tuple[Tensor, Tensor]] | None:
        """What happens after optimizer step number `step` (from 1), in place, to the tensors of all sites of a clause.

        Gradients are still there; `memory` is kept from step to step.  Returns (tensor, mask) of the entries whose
        optimizer state is to be cleared.
        """

    def reselect(
        self, step: int, W: Callable[[], Tensor], theta: dict[str, Tensor]
    ) -> Iterable[tuple[Tensor, Tensor]] | None:
        """As `schedule`, for one site: `W()` is the matrix (d_out, d_in) of its weight as adapted so far."""

    def calibrated(self, W: Tensor, theta: dict[str, Tensor], seen: Seen) -> None:
        """Fill `theta` in place from what a site saw of some batches: its inputs, or the gradient of its weight, as
        `calibration` says."""

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
        """The one view that this method states: train, policy, or of `VIEWS` (`encode` is storage, `tap` is side)."""
        if self.trains or self.policy:
            return "train" if self.trains else "policy"
        stated = [v for v in VIEWS if states(self, v)]
        if len(stated) != 1:
            raise TypeError(f"method {self.name} must state exactly one view, it states {stated or 'none'}")
        return {"encode": "storage", "tap": "side"}.get(stated[0], stated[0])


VIEWS = ("delta", "weight", "output", "input", "tokens", "past", "tap", "encode")


def states(method: Method, name: str, base: type[Method] = Method) -> bool:
    """Whether a method overrides what a base class has under a name."""
    return getattr(type(method), name) is not getattr(base, name)


def refusal(method: Method, site: Site) -> str | None:
    """Why a method cannot stand at a site, or None: its own reason, or one that follows from its view there."""
    if method.view() == "side":
        return _beside(method, site) or method.fits(site)
    if (reason := method.fits(site)) is not None:
        return reason
    dropout, view = getattr(method, "dropout", 0.0), method.view()
    limit = min(site.in_features, site.out_features)
    if method.within_rank and method.r > limit:  # type: ignore[attr-defined]
        return f"r={method.r} is more than the rank {limit} of its weight"  # type: ignore[attr-defined]
    if site.entry is not None:
        return site.entry.refusal(view)
    if site.place.map.reads_ids and (view == "input" or dropout):
        return "it changes activations, and this layer reads ids" + (": set dropout=0 there" if dropout else "")
    if site.rows is not None and (view == "input" or states(method, "shifted")):
        return f"it changes the {'input' if view == 'input' else 'bias'} of the whole layer, and this is a part of it"
    if site.place.called:
        return None
    if view in ("output", "input"):
        return f"it changes the {view} of a layer, and this weight is read without calling one"
    if view in ("delta", "weight") and dropout:
        return "dropout drops inputs of a layer, and this weight is read without calling one: set dropout=0 there"
    if shifts(method, site):
        return "it shifts the output of a layer, and this weight is read without calling one"
    return None


def _beside(method: Method, site: Site) -> str | None:
    """Why a side network cannot stand beside a block, or None."""
    block = site.block
    if block is None or block.refusal:
        return block.refusal if block is not None else "it is no block"
    if method.ends == "head" and block.head is None:
        return "the model has no head that it could join, or several"
    if method.through and block.wiring is None:
        return "it is not made of an attention and a feed-forward network with one norm each"
    return None


def on_meta(method: Method, site: Site) -> dict[str, Tensor]:
    """The tensors of a method at a site without their values."""
    return {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in method.params(site).items()}


def update(method: Method, theta: Mapping[str, Any], shape: tuple[int, int]) -> Form:
    """The update that a method states for a matrix of that shape (d_out, d_in), which it is told where it asks."""
    return method.delta(**theta, shape=shape) if asks_shape(type(method)) else method.delta(**theta)


@functools.cache
def asks_shape(cls: type[Method]) -> bool:
    """Whether the `delta` of a method has a parameter `shape`."""
    return "shape" in inspect.signature(cls.delta).parameters


def shifts(method: Method, site: Site) -> bool:
    """Whether a method updates the bias too."""
    if method.view() == "delta":
        return update(method, on_meta(method, site), (site.out_features, site.in_features)).shift() is not None
    return method.view() == "weight" and states(method, "shifted")
