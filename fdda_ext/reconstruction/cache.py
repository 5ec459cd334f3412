"""Storage for the values of a few nodes on all calibration images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from tempfile import NamedTemporaryFile, gettempdir

import torch
from torch import Tensor

from ..errors import UsageError

__all__ = ["BATCH", "Cache", "collect"]

#: Images in a forward pass that fills caches. It is fixed, because sums may depend on it.
BATCH = 32


class Cache:
    """One value for each image.

    Args:
        images: Number of images, n.
        example: Example values, ``[*, ...]``, that give shape, dtype and device.
        limit: Largest size in memory, in bytes. A larger cache is memory-mapped to an unnamed
            temporary file.
    """

    def __init__(self, images: int, example: Tensor, limit: int) -> None:
        self.shape, self.device = example.shape[1:], example.device
        numel = images * self.shape.numel()
        if numel * example.element_size() <= limit:
            rows = torch.empty(numel, dtype=example.dtype, device=example.device)
        else:
            size = numel * example.element_size()
            with NamedTemporaryFile() as file:  # the mapping outlives the file's name
                try:
                    # With a sparse file, a full disk would end the process.
                    if hasattr(os, "posix_fallocate"):  # not on macOS
                        os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    raise UsageError(
                        f"caches: expected {size / 2**20:.0f} MiB of free disk space in "
                        f"{gettempdir()} (set by TMPDIR), for a cache above cache_megabytes, got: "
                        f"{error.strerror}"
                    ) from None
                rows = torch.from_file(file.name, shared=True, size=numel, dtype=example.dtype)
        self.rows = rows.view(images, -1)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def write(self, begin: int, values: Tensor) -> None:
        """Store ``values [m, ...]`` of images ``begin`` to ``begin + m``."""
        if values.dim() == 4:  # to channels_last order
            values = values.permute(0, 2, 3, 1)
        self.rows[begin : begin + len(values)] = values.reshape(len(values), -1)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield the values of ``size`` images at a time, like a tensor's `split`."""
        for images in torch.arange(len(self), device=self.device).split(size):
            yield self.read(images)

    def read(self, images: Tensor) -> Tensor:
        """Return the values ``[m, ...]`` of ``images``, int64 ``[m]``."""
        values = self.rows[images.to(self.rows.device)].to(self.device)
        if len(self.shape) != 3:
            return values.view(-1, *self.shape)
        channels, height, width = self.shape
        return values.view(-1, height, width, channels).permute(0, 3, 1, 2)


def collect(
    values: Callable[..., Sequence[Tensor]], sources: Sequence[Tensor | Cache], limit: int
) -> list[Cache]:
    """Run ``values`` on all images in batches, and return caches of its results.

    Args:
        values: Function from a batch of each source to tensors ``[m, ...]``, run without gradients.
        sources: Images ``[n, C, H, W]`` or caches of n images.
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
