"""How far a network has been computed while its parts change one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.fx import GraphModule

from .cache import Cache, collect
from .reconstruct import values_of
from .units import arguments_of

__all__ = ["Frontier"]


class Frontier:
    """Values of nodes on all images, each stop's computed from those of the stop before.

    Where each stop names all that is computed so far and read later, as the inputs of units do,
    all together cost one pass through the network; a pass from the image to each would cost half as
    many as there are stops. What lies between two stops may change until the latter is reached, and
    not afterwards.

    Args:
        network: To be computed.
        stops: Names of nodes, stop by stop in the order of computation.
        images: ``[n, C, H, W]``.
        limit: See `Cache`, for each node.
    """

    def __init__(
        self, network: GraphModule, stops: Sequence[Sequence[str]], images: Tensor, limit: int
    ) -> None:
        self.network = network
        self.stops = stops
        self.limit = limit
        nodes = network.graph.nodes
        (image,) = (node.name for node in nodes if node.op == "placeholder" and node.users)
        self.begin: dict[str, Tensor | Cache] = {image: images}
        self.restart()

    def restart(self) -> None:
        """Forget all values but the images."""
        self.known = self.begin
        self.reached = -1

    def at(self, stop: int) -> list[Cache]:
        """The values of ``stops[stop]``.

        All stops on the way are made, wherever it begins, so that sums are the same to the bit. To
        go back is to begin again with the image.
        """
        if stop < self.reached:
            self.restart()
        while self.reached < stop:
            self._advance()
        return [cast(Cache, self.known[name]) for name in self.stops[stop]]

    def _advance(self) -> None:
        """Make the next stop, and forget what no later one needs."""
        stop = self.reached + 1
        caches = self._computed(self.stops[stop])
        known = self.known | caches
        ahead = [name for names in self.stops[stop + 1 :] for name in names]
        later = arguments_of(self.network, ahead, known)
        self.known = self.begin | {name: known[name] for name in (*caches, *later)}
        self.reached = stop

    def _computed(self, names: Sequence[str]) -> dict[str, Cache]:
        """Caches of ``names``."""
        caches = {name: value for name in names if isinstance(value := self.known.get(name), Cache)}
        if missing := [name for name in names if name not in caches]:
            values = values_of(self.network, missing, self.known)
            arguments = arguments_of(self.network, missing, self.known)
            found = collect(values, [self.known[name] for name in arguments], self.limit)
            caches |= dict(zip(missing, found, strict=True))
        return caches
