"""Quick checks of a float network before a long run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import UnreadableImageError
from ..image_size import ImageSize, height_and_width
from ..preprocessing import Preprocessing
from .evaluation import ImageSource
from .memory import must_fit

__all__ = ["diagnose", "doubt_margin"]

#: Number of classes, and images of each. Several images of a class show whether predictions agree.
_CLASSES, _PER_CLASS = 16, 16
_BATCH = 32
#: Images classified with and without margin, and the percentage of predictions that may differ.
_COMPARED, _DIFFERING = 100, 5


def _sample(source: ImageSource) -> tuple[Tensor, Tensor]:
    """Return the first readable images of classes spread over the data, and their labels."""
    classes = source.labels.unique()
    spread = torch.linspace(0, len(classes) - 1, min(_CLASSES, len(classes))).round().long()
    pixels, labels = [], []
    for label in classes[spread].tolist():
        for index in (source.labels == label).nonzero().flatten()[:_PER_CLASS].tolist():
            try:
                pixels.append(source.pixels(index))
                labels.append(label)
            except UnreadableImageError:
                continue  # the evaluation counts and reports it
    return (torch.stack(pixels) if pixels else torch.empty(0)), torch.tensor(labels)


def _normalisations(source: ImageSource, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the problem that another preparation of ``values`` (0 to 1) solves, and its images."""
    usual = Preprocessing().for_channels(values.shape[1])
    channels = usual.channels
    for mean, std in (
        (usual.mean, usual.std),
        ((0.5,) * channels, (0.5,) * channels),
        ((0.0,) * channels, (1.0,) * channels),
        ((0.0,) * channels, (1 / 255,) * channels),
    ):
        lists = [f"[{','.join(f'{number:.4g}' for number in numbers)}]" for numbers in (mean, std)]
        advice = f"--preprocessing.mean={lists[0]} --preprocessing.std={lists[1]}"
        left, right = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
        yield f"the normalisation: give {advice}", (values - left) / right
    if channels == 3:
        yield "the colour order: the network takes blue first", source.normalise(values.flip(1))


def _predict(network: nn.Module, images: Tensor, device: torch.device | str) -> Tensor:
    """Return the predicted classes ``[N]`` of normalised ``images [N, C, H, W]``."""
    with must_fit(image_size=images.shape[-1]):
        return torch.cat([network(b.to(device)).argmax(1).cpu() for b in images.split(_BATCH)])


@runtime_checkable
class MarginSource(ImageSource, Protocol):
    """Images that may be enlarged before the crop, so that the crop removes a margin."""

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the crop."""
        ...

    def pixels_without_margin(self, index: int, /) -> Tensor | None:
        """Return what `pixels` gives, without a margin; None for an image that is not enlarged."""
        ...


@torch.no_grad()
def doubt_margin(
    network: nn.Module, source: ImageSource, device: torch.device | str = "cpu"
) -> str | None:
    """Check whether enlarging and cropping images changes the network's predictions.

    Args:
        network: Module from images ``[B, C, H, W]`` to logits.
        source: The images, of which at most 100 are classified in both ways.
        device: Device of the network.

    Returns:
        None if images are not enlarged, or at most 5 % of the predictions change. Otherwise a
        sentence with the correct predictions of both ways, and the option for the other way.
    """
    if not isinstance(source, MarginSource):
        return None
    pairs, labels = [], []
    spread = torch.linspace(0, len(source) - 1, min(_COMPARED, len(source)), dtype=torch.float64)
    for index in spread.long().tolist():
        try:
            whole = source.pixels_without_margin(index)
            if whole is not None:
                pairs.append((source.pixels(index), whole))
                labels.append(int(source.labels[index]))
        except UnreadableImageError:
            continue  # the evaluation counts and reports it
    if not pairs:
        return None
    network.eval()
    cut, whole = (
        _predict(network, source.normalise(torch.stack(images)), device)
        for images in zip(*pairs, strict=True)
    )
    count, differing = len(pairs), int((cut != whole).sum())
    if 100 * differing <= _DIFFERING * count:
        return None
    right = [int((found == torch.tensor(labels)).sum()) for found in (cut, whole)]
    short = min(height_and_width(source.image_size))
    return (
        f"enlarging and cropping the images changes {differing} of {count} predictions of the "
        f"float network: {right[0]} are correct, and {right[1]} without enlarging; "
        f"--preprocessing.resize={short} turns enlarging off"
    )


@torch.no_grad()
def diagnose(
    network: nn.Module,
    source: ImageSource,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> str | None:
    """Check whether ``network`` classifies some images of ``source`` better than chance.

    Args:
        network: Module from images ``[B, C, H, W]`` to logits ``[B, num_classes]``.
        source: The images, of which at most 16 of each of 16 classes are classified.
        num_classes: Number of classes, K.
        device: Device of the network.

    Returns:
        None if it does. Otherwise a sentence with the most likely cause: another normalisation or
        colour order (these are tried), another order of classes (images of one class agree on a
        wrong one), or wrong weights.
    """
    pixels, labels = _sample(source)
    if not len(labels):
        return None

    def predict(images: Tensor) -> Tensor:
        return _predict(network, images, device)

    def share_right(predictions: Tensor) -> float:
        """Return the accuracy outside the class predicted most, where it is right by chance."""
        others = labels != predictions.mode().values
        return float((predictions == labels)[others].float().mean()) if others.any() else 1.0

    network.eval()
    chance = 1 / num_classes
    guessing = chance + 3 * math.sqrt(chance * (1 - chance) / len(labels))
    predictions = predict(source.normalise(pixels))
    if share_right(predictions) > guessing:
        return None
    right = int((predictions == labels).sum())
    found = f"the float network gets {right} of {len(labels)} images right, no better than chance"

    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    tried = [(share_right(predict(im)), what) for what, im in _normalisations(source, values)]
    best, what = max(tried)
    if best > 2 * guessing:
        return f"{found}; the likely cause is {what}; then {100 * best:.0f} % are right"
    if len(predictions.unique()) == 1:
        return (
            f"{found}: all get class {int(predictions[0])}; the likely cause is weights of another "
            "network, or a layout of the weights that their names do not show"
        )
    answers = [predictions[labels == label] for label in labels.unique()]
    agreed = [answer.mode().values for answer in answers]
    agreement = sum(
        float((answer == most).float().mean()) for answer, most in zip(answers, agreed, strict=True)
    ) / len(answers)
    several = min(len(answer) for answer in answers) >= 4
    if several and agreement > 0.5 and len({int(most) for most in agreed}) > 0.7 * len(agreed):
        return (
            f"{found}, but images of one class agree ({100 * agreement:.0f} %); the likely cause "
            "is the order of the classes: folders sorted by name are not in the weights' order"
        )
    return (
        f"{found}; the likely cause is the weights: random ones, those of another network, of "
        "other classes, or for another image_size"
    )
