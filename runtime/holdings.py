"""What a model holds: every tensor once, as base or adapter, with its storage, its bytes and whether it trains.

Works on plain models too, and on the meta device.  It knows nothing of what a graph saves: `passes.counting` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from rewrite.codegen.typed import typed_op
from rewrite.runtime.adapter import Adapter, Stored


@dataclass(frozen=True)
class Held:
    """One tensor of a model.

    `storage`: `dense`, `buffer`, `adapter`, or the name of a storage format.  `parameters`: how many numbers of
    the function it stands for; of several stored tensors, the first stands for the whole weight.
    """

    name: str
    storage: str
    dtype: torch.dtype
    parameters: int
    bytes: int
    trains: bool
    device: str

    @property
    def base(self) -> bool:
        """Whether it belongs to the base model."""
        return self.storage != "adapter"


def holdings(model: nn.Module) -> list[Held]:
    """Every tensor of `model`, shared ones once, in the model's order.

    >>> [(h.name, h.storage, h.parameters, h.bytes) for h in holdings(nn.Linear(3, 2))]
    [('weight', 'dense', 6, 24), ('bias', 'dense', 2, 8)]
    """
    seen: set[int] = set()
    found: list[Held] = []
    for path, module in model.named_modules():
        for name, tensor, storage, parameters in _tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = f"{path}.{name}" if path else name
            count = tensor.numel() * tensor.dtype.itemsize
            found.append(Held(full, storage, tensor.dtype, parameters, count, tensor.requires_grad, tensor.device.type))
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, str, int]]:
    """(name, tensor, storage, parameters) of what a module itself holds."""
    listed = module.children() if isinstance(module, ParametrizationList) else ()
    stored = next((m for m in listed if isinstance(m, Stored)), None)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for number, (name, tensor) in enumerate(own):
        if isinstance(module, Adapter):
            yield name, tensor, "adapter", tensor.numel()
        elif stored is not None:
            op = typed_op(stored.op)
            whole = torch.Size(stored.graft.shape).numel()
            yield name, tensor, op.name if op else "stored", 0 if number else whole
        elif isinstance(tensor, nn.Parameter):
            yield name, tensor, "dense", tensor.numel()
        else:
            yield name, tensor, "buffer", 0
