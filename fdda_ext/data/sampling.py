"""Samples in which every class keeps its share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["fair_sample"]

#: An arbitrary number. Another one gives other samples.
_SEED = 0x5EED


def _hashes(count: int) -> np.ndarray:
    """Hash the numbers from 0 with SplitMix64, uint64 ``[count]``.

    Random generators of libraries may change between versions.
    """
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(_SEED)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fair_sample(labels: Tensor, count: int) -> Tensor:
    """Return the indices of a sample in which every class has its share of all images.

    A sample is the beginning of an order of all images, so smaller samples are parts of larger
    ones. The order is the same on every machine. Image r of the ``n_k`` images of class k, in
    random order, has the position ``(r + u_k) / n_k``. The ``u_k`` are spread evenly over 0 to 1 in
    random order, so no class is favoured. The number of images of class k at positions below t
    differs from ``t * n_k`` by less than 1.

    Args:
        labels: Labels, int64 ``[n]``.
        count: Size of the sample; all images if there are fewer.

    Returns:
        int64 ``[min(count, n)]``, in the order of the positions.
    """
    classes, places, sizes = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    hashes = _hashes(len(places))
    by_class = np.lexsort((hashes, places))
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(places), dtype=np.int64)
    ranks[by_class] = np.arange(len(places)) - np.repeat(starts, sizes)
    offsets = np.empty(len(classes))
    offsets[np.argsort(_hashes(len(classes)))] = (np.arange(len(classes)) + 0.5) / max(
        len(classes), 1
    )
    scale = (ranks + offsets[places]) / sizes[places]
    return torch.from_numpy(np.lexsort((hashes, scale))[:count].astype(np.int64))
