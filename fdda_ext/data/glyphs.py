"""``glyphs``: characters in many typefaces, rendered on demand from matplotlib's fonts.

Every image depends only on (split, seed, index). Nothing is stored, and order, batches and workers
have no effect. The validation and test splits have typefaces of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from ..image_size import ImageSize, height_and_width
from .augmentation import Augmentation
from .dataset import ImageDataset, to_channels

__all__ = ["CHARACTERS", "TEST_FACES", "TRAIN_FACES", "VALIDATION_FACES", "Glyphs", "faces_of"]

# Left out are characters that resemble others: o O (0), l I i j (1, J), c k p s u v w x y z (their
# capitals), q (9), and some Greek letters (Latin ones).
_LATIN = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabdefghmnrt"
_OTHERS = "ΓΔΘΛΞΠΣΦΨΩδλμπωξ&%@#$?+=<*"

#: Characters, one per class.
CHARACTERS = _LATIN + _OTHERS

#: Typefaces of the training and calibration splits.
TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmr10",
    "cmtt10",
)

#: Typefaces of the validation split.
VALIDATION_FACES = (
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Italic",
    "STIXGeneralBolIta",
    "cmb10",
)

#: Typefaces of the test split.
TEST_FACES = (
    "DejaVuSans-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif-Bold",
    "STIXGeneralItalic",
    "cmss10",
)

_SPLITS = {"train": 0, "calibration": 1, "test": 2, "validation": 3}
_LENGTHS = {
    "train": 600 * len(CHARACTERS),
    "calibration": 16 * len(CHARACTERS),
    "validation": 150 * len(CHARACTERS),
    "test": 150 * len(CHARACTERS),
}
_FACES = {
    "train": TRAIN_FACES,
    "calibration": TRAIN_FACES,
    "validation": VALIDATION_FACES,
    "test": TEST_FACES,
}
_LUMINANCE = np.array([0.3, 0.59, 0.11])
_LEAST_CONTRAST = 0.13


@cache
def faces_of(character: str, split: str) -> tuple[str, ...]:
    """Return the typefaces of ``split`` with ``character``; Computer Modern has only Latin ones."""
    return tuple(face for face in _FACES[split] if not face.startswith("cm") or character in _LATIN)


@cache
def _glyph(face: str, character: str) -> Image.Image:
    """Coverage of a character, 64 pixels per em, with a border of 2 pixels."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(folder / f"{face}.ttf"), 64)
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(image).text((2 - left, 2 - top), character, font=font, fill=255)
    return image


def _place(
    face: str,
    character: str,
    size: ImageSize,
    *,
    extent: float,
    centre: tuple[float, float],
    angle: float,
    shear: float,
    stretch: float,
) -> np.ndarray:
    """Coverage ``[H, W, 1]`` of a character under an affine map.

    ``extent`` is its longer side relative to the image's shorter one. ``centre`` is its offset from
    the middle, relative to width and height.
    """
    glyph = _glyph(face, character)
    height, width = height_and_width(size)
    scale = max(glyph.size) / (extent * min(height, width))
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = scale * cos * stretch, scale * (sin + shear)
    d, e = -scale * sin, scale * cos / stretch
    x, y = (0.5 + centre[0]) * width, (0.5 + centre[1]) * height
    matrix = (a, b, glyph.width / 2 - a * x - b * y, d, e, glyph.height / 2 - d * x - e * y)
    placed = glyph.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(placed, dtype=np.float32)[..., None] / 255


def render(split: str, seed: int, index: int, size: ImageSize) -> tuple[np.ndarray, int]:
    """Render image ``index``, uint8 ``[H, W, 3]``, of class ``index`` modulo K."""
    rng = np.random.default_rng([seed, _SPLITS[split], index])
    label = index % len(CHARACTERS)
    return draw(CHARACTERS[label], faces_of(CHARACTERS[label], split), size, rng), label


def draw(text: str, faces: Sequence[str], size: ImageSize, rng: np.random.Generator) -> np.ndarray:
    """Draw ``text`` in one of ``faces`` with random colours and clutter, uint8 ``[H, W, 3]``."""
    height, width = height_and_width(size)
    short = min(height, width)
    face = faces[int(rng.integers(len(faces)))]

    ink, paper = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    while abs((ink - paper) @ _LUMINANCE) < _LEAST_CONTRAST:
        paper = rng.uniform(0, 1, 3)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)[..., None]
    y, x = y / height - 0.5, x / width - 0.5
    slope = rng.normal(0, 0.25, (2, 3))
    image = paper + x * slope[0] + y * slope[1]

    for _ in range(rng.integers(2, 5)):  # clutter: parts of other characters at the border
        direction = rng.uniform(0, 2 * np.pi)
        coverage = _place(
            TRAIN_FACES[rng.integers(len(TRAIN_FACES))],
            _LATIN[rng.integers(len(_LATIN))],
            size,
            extent=rng.uniform(0.4, 0.8),
            centre=(0.56 * np.cos(direction), 0.56 * np.sin(direction)),
            angle=rng.uniform(-0.5, 0.5),
            shear=0.0,
            stretch=1.0,
        )
        image = image + coverage * (rng.uniform(0, 1, 3) - image) * rng.uniform(0.4, 0.9)

    coverage = _place(
        face,
        text,
        size,
        extent=rng.uniform(0.45, 0.85),
        centre=(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)),
        angle=rng.normal(0, 0.2),
        shear=rng.normal(0, 0.2),
        stretch=np.exp(rng.normal(0, 0.12)),
    )
    image = image + coverage * (ink - image)

    blurred = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
    radius = rng.uniform(0, 0.9) * short / 32
    if radius > 0.3 * short / 32:
        blurred = blurred.filter(ImageFilter.GaussianBlur(radius))
    noise = rng.normal(0, rng.uniform(2, 36), (height, width, 3))
    return (np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8)


class Glyphs(ImageDataset):
    """The ``glyphs`` data set.

    Args:
        split: "train" (600 images per class), "calibration" (16 per class, in the typefaces of
            "train"), "validation" or "test" (150 per class, in typefaces of their own).
        image_size: Height and width.
        seed: Seed of the images; validation and test always use 0.
        channels: 1 (gray), 3 (RGB) or 4 (with full opacity).
    """

    num_classes = len(CHARACTERS)
    class_names = tuple(CHARACTERS)
    augmentation = Augmentation(crop_scale=(0.75, 1.0), crop_ratio=(0.85, 1.18), flip=False)

    def __init__(
        self, split: str, image_size: ImageSize = 32, seed: int = 0, channels: int = 3
    ) -> None:
        self.mean, self.std = (0.5,) * channels, (0.25,) * channels
        self.split = split
        self.image_size = image_size
        self.seed = 0 if split in ("validation", "test") else seed
        self.labels = torch.arange(_LENGTHS[split]) % self.num_classes

    def pixels(self, index: int) -> Tensor:
        """Return uint8 ``[C, H, W]``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, _ = render(self.split, self.seed, index, self.image_size)
        return to_channels(torch.from_numpy(image).permute(2, 0, 1), self.channels).contiguous()
