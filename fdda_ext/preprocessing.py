"""Conversion of image files to the input that a network's weights expect."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .errors import UsageError
from .image_size import (
    ImageSize,
    height_and_width,
    parse_image_size,
    show_image_size,
    to_image_size,
)

__all__ = ["CHANNELS", "Interpolation", "Preprocessing", "PreprocessingConfig"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

#: Pillow's mode for each number of channels: gray, colours, and colours with opacity.
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, subtract the mean, divide by the standard deviation.

    Resizing keeps the image's proportions and makes its short side `resize`. If height and width of
    `image_size` differ, the image just covers a frame with these proportions and the short side
    `resize`. The crop removes the margin, the difference between `resize` and `image_size`.

    The defaults are the usual ones for ImageNet.

    Attributes:
        mean, std: One value for each of 1 (gray), 3 (RGB) or 4 (RGBA) channels, for pixels from 0
            to 1.
        image_size: Size of the crop.
        resize: Short side before the crop.
        interpolation: Method of resizing, antialiased.
        keep_small: Whether to enlarge images at most to `image_size`, without a margin. False if
            the publisher of the weights prescribes `resize` for every image.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: ImageSize = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"
    keep_small: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", parse_image_size(self.image_size, "preprocessing"))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in CHANNELS or not all(math.isfinite(value) for value in values):
                raise UsageError(
                    f"preprocessing: expected {name} to be one, three or four finite numbers, "
                    f"got {values}"
                )
        if len(self.mean) != len(self.std):
            raise UsageError(
                "preprocessing: expected as many values in mean as in std, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise UsageError(f"preprocessing: expected std above 0, got {self.std}")
        if self.short_side < 8:
            raise UsageError(
                f"preprocessing: expected image_size at least 8, got {_written(self.image_size)}"
            )
        if self.resize < self.short_side:
            raise UsageError(
                f"preprocessing: expected resize at least image_size ({self.short_side}), "
                f"got {self.resize}"
            )
        if self.interpolation not in get_args(Interpolation):
            raise UsageError(
                f"preprocessing: expected interpolation to be one of {get_args(Interpolation)}, "
                f"got {self.interpolation}"
            )

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    @property
    def short_side(self) -> int:
        """The smaller of height and width of `image_size`."""
        return min(height_and_width(self.image_size))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image of ``height`` and ``width`` before the crop."""
        crop_height, crop_width = height_and_width(self.image_size)
        scale = self.resize / self.short_side
        frame = (round(crop_height * scale), round(crop_width * scale))
        with_margin = _covering(frame, height, width)
        if not self.keep_small or with_margin[0] <= height:
            return with_margin
        without = _covering((crop_height, crop_width), height, width)
        return (height, width) if without[0] <= height else without

    def for_size(self, image_size: ImageSize | str | None) -> Preprocessing:
        """Return the same preprocessing for another image size, with a margin in proportion.

        Args:
            image_size: The new size; None for no change.
        """
        if image_size is None:
            return self
        size = parse_image_size(image_size, "preprocessing")
        if size == self.image_size:
            return self
        short = min(height_and_width(size))
        resize = round(short * self.resize / self.short_side)
        return replace(self, image_size=size, resize=resize, keep_small=True)

    def for_channels(self, channels: int) -> Preprocessing:
        """Return the same preprocessing for another number of channels.

        A gray or opacity channel gets the mean of the colours' values.

        Raises:
            UsageError: If ``channels`` is not 1, 3 or 4.
        """
        if channels not in CHANNELS:
            raise UsageError(
                "preprocessing: expected images of 1 (gray), 3 (RGB) or 4 (RGBA) channels, "
                f"got {channels}"
            )
        return replace(
            self, mean=_of_channels(self.mean, channels), std=_of_channels(self.std, channels)
        )

    @property
    def without_margin(self) -> Preprocessing:
        """The same preprocessing, but with images resized to the size of the crop."""
        return replace(self, resize=self.short_side, keep_small=True)

    def describe(self, stored_size: ImageSize | None = None) -> str:
        """Return one line of text. ``stored_size`` is the common size of all images, if any."""
        how = f"resize {self.resize} {self.interpolation}, crop {_written(self.image_size)}"
        if stored_size is not None:
            stored = height_and_width(stored_size)
            resized = self.resized(*stored)
            how = f"{show_image_size(stored_size)}"
            how += (
                " as they are"
                if resized == stored
                else (f", resize {show_image_size(to_image_size(*resized))} {self.interpolation}")
            )
            if resized != height_and_width(self.image_size):
                how += f", crop {_written(self.image_size)}"
        return f"{how}, mean {_short(self.mean)}, std {_short(self.std)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes in a form for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """Rebuild what `to_dict` returned.

        Raises:
            UsageError: If a value breaks a rule.
            TypeError: If there are other keys or types.
        """
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        # Files of older versions, which lack this key, resized every image.
        return Preprocessing(**{"keep_small": False, **values})


@dataclass(frozen=True)
class PreprocessingConfig:
    """Changes to the preprocessing that the weights' metadata prescribe. None changes nothing.

    Attributes:
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, for pixels from 0 to 1.
        resize: Short side to which every image is resized before its centre is cropped.
        interpolation: Method of resizing.
    """

    mean: list[float] | None = None
    std: list[float] | None = None
    resize: int | None = None
    interpolation: Interpolation | None = None

    @property
    def given(self) -> bool:
        """Whether any change is given."""
        return any(value is not None for value in asdict(self).values())

    def apply(self, default: Preprocessing, image_size: ImageSize | str | None) -> Preprocessing:
        """Return ``default`` for images of ``image_size``, with the changes given here.

        Raises:
            UsageError: If the result breaks a rule of `Preprocessing`, or has other channels than
                ``default``.
        """
        scaled = default.for_size(image_size)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != default.channels:
                raise UsageError(
                    f"preprocessing: expected {name} to have one number for each of the "
                    f"{default.channels} channel(s) that the network takes, got {values}"
                )
        return replace(
            scaled,
            mean=scaled.mean if self.mean is None else tuple(self.mean),
            std=scaled.std if self.std is None else tuple(self.std),
            resize=scaled.resize if self.resize is None else self.resize,
            interpolation=self.interpolation or scaled.interpolation,
            keep_small=scaled.keep_small and self.resize is None,
        )


def _of_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    colours = values[:3] if len(values) >= 3 else values * 3
    mean = sum(colours) / 3
    return {1: (mean,), 3: colours, 4: (*colours, mean)}[channels]


def _covering(frame: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Return the smallest size with the proportions of (height, width) that covers ``frame``."""
    # This rounds like torchvision.transforms.Resize: one side fits exactly, the other rounds down.
    if frame[0] * width <= frame[1] * height:
        return max(frame[1] * height // width, frame[0]), frame[1]
    return frame[0], max(frame[0] * width // height, frame[1])


def _written(size: ImageSize) -> str:
    """Format a size like the value of an option."""
    return str(size) if isinstance(size, int) else show_image_size(size)


def _short(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
