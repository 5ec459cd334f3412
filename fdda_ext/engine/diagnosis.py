"""A quick look at a float network before a long run: if it guesses, the likely reason."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UnreadableImageError
from .evaluation import ImageSource
from .memory import must_fit

__all__ = ["diagnose"]

#: Images of so many classes, so many of each: several of one class show whether they agree.
_CLASSES, _PER_CLASS = 16, 16
_BATCH = 32


def _sample(source: ImageSource) -> tuple[Tensor, Tensor]:
    """The first images of classes spread over the data, and their labels; damaged ones left out."""
    classes = source.labels.unique()
    spread = torch.linspace(0, len(classes) - 1, min(_CLASSES, len(classes))).round().long()
    pixels, labels = [], []
    for label in classes[spread].tolist():
        for index in (source.labels == label).nonzero().flatten()[:_PER_CLASS].tolist():
            try:
                pixels.append(source.pixels(index))
                labels.append(label)
            except UnreadableImageError:
                continue  # the evaluation counts and names it
    return (torch.stack(pixels) if pixels else torch.empty(0)), torch.tensor(labels)


def _normalisations(source: ImageSource, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other ways to prepare images of ``values`` from 0 to 1, and how to ask for them."""
    for mean, std in (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    ):
        lists = [f"[{','.join(f'{number:.4g}' for number in numbers)}]" for numbers in (mean, std)]
        advice = f"--preprocessing.mean={lists[0]} --preprocessing.std={lists[1]}"
        left, right = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
        yield f"the normalisation: give {advice}", (values - left) / right
    yield "the order of colours: the network takes blue first", source.normalise(values.flip(1))


@torch.no_grad()
def diagnose(
    network: nn.Module,
    source: ImageSource,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> str | None:
    """See whether ``network`` classifies some images of ``source`` better than by chance.

    Args:
        network: From images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.
        source: Images to be classified, 16 of each of 16 classes at most are.
        num_classes: K.
        device: Where the network is.

    Returns:
        None if it does. Otherwise a sentence with the likeliest of: another normalisation or order
        of colours (tried out), another order of classes (images of one class agree on another
        one), a network that gives all images one class, weights of something else.
    """
    pixels, labels = _sample(source)
    if not len(labels):
        return None

    def predict(images: Tensor) -> Tensor:
        with must_fit(image_size=images.shape[-1]):
            return torch.cat([network(b.to(device)).argmax(1).cpu() for b in images.split(_BATCH)])

    def share_right(predictions: Tensor) -> float:
        """Of images that are not of the class that most get, which is right by itself."""
        others = labels != predictions.mode().values
        return float((predictions == labels)[others].float().mean()) if others.any() else 1.0

    network.eval()
    chance = 1 / num_classes
    guessing = chance + 3 * math.sqrt(chance * (1 - chance) / len(labels))
    predictions = predict(source.normalise(pixels))
    if share_right(predictions) > guessing:
        return None
    right = int((predictions == labels).sum())
    found = f"the float network is right on {right} of {len(labels)} images, no better than chance"

    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    tried = [(share_right(predict(im)), what) for what, im in _normalisations(source, values)]
    best, what = max(tried)
    if best > 2 * guessing:
        return f"{found}; the likely cause is {what}, and {100 * best:.0f} % are right"
    if len(predictions.unique()) == 1:
        return (
            f"{found}: all get class {int(predictions[0])}; the likely cause is weights of another "
            "network, or of another layout than their names say"
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
            "is the order of the classes: folders, sorted by name, are not in the weights' order"
        )
    return (
        f"{found}; the likely cause is the weights: random ones, those of another network, of "
        "other classes, or for another image_size"
    )
