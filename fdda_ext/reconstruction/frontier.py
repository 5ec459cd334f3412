"""Values between the units of a network while the units change one after another."""

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
    """Values of nodes on all images, computed stop by stop.

    Each stop is computed from the values of the stop before. If every stop names all values that
    are read later, as the inputs of units do, all stops together cost one pass through the network.
    A pass from the image to each stop would cost half as many passes as there are stops. The part
    between two stops may change until the second stop is reached, but not after.

    Args:
        network: Network to compute.
        stops: Names of the nodes of each stop, in order of computation.
        images: Images ``[n, C, H, W]``.
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
        """Forget all values except the images."""
        self.known = self.begin
        self.reached = -1

    def at(self, stop: int) -> list[Cache]:
        """Return the values of ``stops[stop]``.

        All stops before it are computed too, so the values are bit-identical for every starting
        point. An earlier stop is computed from the images again.
        """
        if stop < self.reached:
            self.restart()
        while self.reached < stop:
            self._advance()
        return [cast(Cache, self.known[name]) for name in self.stops[stop]]

    def _advance(self) -> None:
        """Compute the next stop, and forget the values that no later stop needs."""
        stop = self.reached + 1
        caches = self._computed(self.stops[stop])
        known = self.known | caches
        ahead = [name for names in self.stops[stop + 1 :] for name in names]
        later = arguments_of(self.network, ahead, known)
        self.known = self.begin | {name: known[name] for name in (*caches, *later)}
        self.reached = stop

    def _computed(self, names: Sequence[str]) -> dict[str, Cache]:
        caches = {name: value for name in names if isinstance(value := self.known.get(name), Cache)}
        if missing := [name for name in names if name not in caches]:
            values = values_of(self.network, missing, self.known)
            arguments = arguments_of(self.network, missing, self.known)
            found = collect(values, [self.known[name] for name in arguments], self.limit)
            caches |= dict(zip(missing, found, strict=True))
        return caches
