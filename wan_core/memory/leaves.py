"""The tensors of a module as places that can be read and filled: parameters and buffers, wherever they are."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter or buffer `name` of the module `owner` itself."""

    owner: nn.Module
    name: str
    is_parameter: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaf) and self.owner is other.owner and self.name == other.name

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))

    def get(self) -> Tensor:
        """What is there now."""
        return (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.name]

    def put(self, tensor: Tensor) -> None:
        """Put a tensor there; a parameter is frozen. Modules refuse to do this themselves across devices and types."""
        if not self.is_parameter:
            self.owner._buffers[self.name] = tensor
        else:
            is_own = isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.name] = tensor if is_own else nn.Parameter(tensor, requires_grad=False)


def leaves(module: nn.Module) -> Iterator[Leaf]:
    """All places of a module and of those in it that hold a tensor."""
    for owner in module.modules():
        for name, tensor in owner._parameters.items():
            if tensor is not None:
                yield Leaf(owner, name, True)
        for name, tensor in owner._buffers.items():
            if tensor is not None:
                yield Leaf(owner, name, False)


def stacks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a model, as they stand in it: what runs one after the other and can come and go by itself."""
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
