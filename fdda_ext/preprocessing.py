"""How image files become a network's input, as its weights want it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .errors import UsageError

__all__ = ["Interpolation", "Preprocessing", "PreprocessingConfig"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short side, cut from the middle, subtract the mean, divide by the deviation.

    The defaults are ImageNet's usual ones.

    Attributes:
        mean, std: Of each colour, of values from 0 to 1.
        image_size: Height and width of what is cut out.
        resize: Short side before that.
        interpolation: Of the resizing, antialiased.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise UsageError(
                    f"preprocessing: expected {name} to be three finite numbers, got {values}"
                )
        if min(self.std) <= 0:
            raise UsageError(f"preprocessing: expected std above 0, got {self.std}")
        if self.image_size < 8:
            raise UsageError(
                f"preprocessing: expected image_size at least 8, got {self.image_size}"
            )
        if self.resize < self.image_size:
            raise UsageError(
                f"preprocessing: expected resize at least image_size ({self.image_size}), "
                f"got {self.resize}"
            )
        if self.interpolation not in get_args(Interpolation):
            raise UsageError(
                f"preprocessing: expected interpolation to be one of {get_args(Interpolation)}, "
                f"got {self.interpolation}"
            )

    def for_size(self, image_size: int | None) -> Preprocessing:
        """The same for another image size (None: the same), cutting away the same share."""
        if image_size is None or image_size == self.image_size:
            return self
        resize = round(image_size * self.resize / self.image_size)
        return replace(self, image_size=image_size, resize=resize)

    def describe(self) -> str:
        """One line for the console."""
        return (
            f"resize {self.resize} {self.interpolation}, crop {self.image_size}, "
            f"mean {_short(self.mean)}, std {_short(self.std)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """Take back what `to_dict` gave.

        Raises:
            UsageError: If a value breaks a rule.
            TypeError: If there are other keys or types.
        """
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Preprocessing(**values)


@dataclass(frozen=True)
class PreprocessingConfig:
    """What to do differently from what the weights' own metadata say; None leaves it to them.

    Attributes:
        mean: Of each colour, of values from 0 to 1.
        std: Likewise.
        resize: Short side before the middle is cut out.
        interpolation: Of the resizing.
    """

    mean: list[float] | None = None
    std: list[float] | None = None
    resize: int | None = None
    interpolation: Interpolation | None = None

    @property
    def given(self) -> bool:
        """Whether anything is to be different."""
        return any(value is not None for value in asdict(self).values())

    def apply(self, default: Preprocessing, image_size: int | None) -> Preprocessing:
        """``default`` for images of ``image_size``, with what is given here in its place.

        Raises:
            UsageError: If the result breaks a rule of `Preprocessing`.
        """
        scaled = default.for_size(image_size)
        return replace(
            scaled,
            mean=scaled.mean if self.mean is None else tuple(self.mean),
            std=scaled.std if self.std is None else tuple(self.std),
            resize=scaled.resize if self.resize is None else self.resize,
            interpolation=self.interpolation or scaled.interpolation,
        )


def _short(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
