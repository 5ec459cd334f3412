"""What a unit is reconstructed from: values of a few nodes on all calibration images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from tempfile import NamedTemporaryFile, gettempdir

import torch
from torch import Tensor

from ..errors import UsageError

__all__ = ["BATCH", "Cache", "collect"]

#: Images in a forward pass that fills caches: always so many, as sums may depend on it.
BATCH = 32


class Cache:
    """One value for each image.

    Args:
        images: n.
        example: Of a value, ``[*, ...]``: shape, type, device.
        limit: Bytes; a larger cache is a memory-mapped file, without a name, in the folder for
            temporary files.
    """

    def __init__(self, images: int, example: Tensor, limit: int) -> None:
        self.shape, self.device = example.shape[1:], example.device
        numel = images * self.shape.numel()
        if numel * example.element_size() <= limit:
            rows = torch.empty(numel, dtype=example.dtype, device=example.device)
        else:
            size = numel * example.element_size()
            with NamedTemporaryFile() as file:  # the mapping outlives the name
                try:
                    # A file with holes would end the process where the disk is full.
                    if hasattr(os, "posix_fallocate"):  # not on macOS
                        os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    raise UsageError(
                        f"caches: expected room for {size / 2**20:.0f} MiB, more than "
                        f"cache_megabytes, in {gettempdir()}, which TMPDIR names, got: "
                        f"{error.strerror}"
                    ) from None
                rows = torch.from_file(file.name, shared=True, size=numel, dtype=example.dtype)
        self.rows = rows.view(images, -1)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def write(self, begin: int, values: Tensor) -> None:
        """Store ``values [m, ...]`` for images ``begin`` to ``begin + m``."""
        if values.dim() == 4:  # as convolutions like them
            values = values.permute(0, 2, 3, 1)
        self.rows[begin : begin + len(values)] = values.reshape(len(values), -1)

    def split(self, size: int) -> Iterator[Tensor]:
        """The values of ``size`` images at a time, as a tensor's `split`."""
        for images in torch.arange(len(self), device=self.device).split(size):
            yield self.read(images)

    def read(self, images: Tensor) -> Tensor:
        """Values ``[m, ...]`` of ``images``, int64 ``[m]``."""
        values = self.rows[images.to(self.rows.device)].to(self.device)
        if len(self.shape) != 3:
            return values.view(-1, *self.shape)
        channels, height, width = self.shape
        return values.view(-1, height, width, channels).permute(0, 3, 1, 2)


def collect(
    values: Callable[..., Sequence[Tensor]], sources: Sequence[Tensor | Cache], limit: int
) -> list[Cache]:
    """Caches of ``values``, which maps a batch of each of ``sources`` to tensors ``[m, ...]``.

    Args:
        values: Runs without gradients.
        sources: Of n images each: the images ``[n, C, H, W]`` or what is kept of them.
        limit: See `Cache`, for each.
    """
    caches: list[Cache] = []
    begin = 0
    for batch in zip(*(source.split(BATCH) for source in sources), strict=True):
        with torch.no_grad():
            found = values(*batch)
        if not caches:
            caches = [Cache(len(sources[0]), value, limit) for value in found]
        for cache, value in zip(caches, found, strict=True):
            cache.write(begin, value)
        begin += len(batch[0])
    return caches
