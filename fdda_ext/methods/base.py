"""What every method is given, and what it must give back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..data import Augmentation
from ..distribution import world_size
from ..engine import parts_of
from ..errors import UsageError
from ..image_size import ImageSize, to_image_size
from ..quantization import QuantizationConfig, prepare

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["Method", "MethodConfig", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A trained network to quantize and the little data there is.

    Attributes:
        teacher: The trained network, in evaluation mode, its parameters without gradients.
        num_classes: K.
        images: Calibration images ``[n, C, H, W]``, normalised, not augmented.
        labels: Their classes, int64 ``[n]``.
        augmentation: How calibration and generated images may be varied.
        quantization: Bits, grid and ranges of the student.
        seed: Of everything random.
        precision: Of teacher and generator. With bfloat16 they run under autocast; statistics,
            losses, the student and all that is trained stay in float32.
        pixel_range: Least and largest value of each channel of a normalised image, ``[C, 1, 1]``
            each; None if unknown.
        cuda_graphs: On a GPU, replay steps as CUDA graphs.
        images_at_once: So many images at most pass a network together in training, where that does
            not change the result but for the order of sums; None for what
            `fdda_ext.engine.parts_of` says.
    """

    teacher: nn.Module
    num_classes: int
    images: Tensor
    labels: Tensor
    augmentation: Augmentation
    quantization: QuantizationConfig
    seed: int
    precision: torch.dtype = torch.float32
    pixel_range: tuple[Tensor, Tensor] | None = None
    cuda_graphs: bool = True
    images_at_once: int | None = None

    def autocast(self) -> torch.autocast:
        """The context in which teacher and generator run."""
        enabled = self.precision is not torch.float32
        return torch.autocast(self.device.type, dtype=self.precision, enabled=enabled)

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the images."""
        return to_image_size(*self.images.shape[-2:])

    @property
    def channels(self) -> int:
        """Channels of the images, C."""
        return int(self.images.shape[1])

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.images.device

    @property
    def replays(self) -> bool:
        """Whether steps become CUDA graphs: not where processes exchange statistics in them."""
        return self.cuda_graphs and self.device.type == "cuda" and world_size() == 1

    def parts(self, images: int) -> int:
        """Into how many parts a batch of ``images`` is divided, so that each fits the memory."""
        if self.images_at_once is not None:
            return -(-images // self.images_at_once)
        return parts_of(images, self.images[0, 0].numel(), self.device)

    def student(self) -> GraphModule:
        """A fake-quantized copy of the teacher, its ranges not yet set."""
        return prepare(self.teacher, self.quantization, self.images[:1])

    def quickly_prepared(self) -> Problem:
        """The same with ranges that take no search, for what does not depend on ranges."""
        quick = replace(self.quantization, weight_range="minmax", activation_range="minmax")
        return replace(self, quantization=quick)

    def random(self) -> torch.Generator:
        """A source of random numbers of its own, started from the seed."""
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass(frozen=True)
class MethodConfig:
    """Base of the frozen dataclasses that hold a method's constants."""

    #: The method's name in messages.
    name: ClassVar[str]

    def check_not_negative(self, *names: str) -> None:
        """Refuse settings that are negative or not finite."""
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"{self.name}: expected {name} at least 0 and finite, got {getattr(self, name)}"
                )


class Method(ABC):
    """One way to a quantized student.

    Building it does everything that is not training (ranges, centres); `step` is then called
    ``iterations`` times, 0 for a method that only calibrates. `state_dict` holds all that decides
    the next step, so that a resumed run ends with the very same weights.
    """

    #: One line for ``--help`` and for tables.
    summary: ClassVar[str]
    #: Folder of its presets: whose constants it takes.
    presets: ClassVar[str] = "fdda"
    #: Whether it looks at the calibration images; if not, nothing but their shape is used.
    real_images: ClassVar[bool] = True
    #: Whether it needs the classes of the calibration images.
    needs_labels: ClassVar[bool] = False
    #: Whether it takes the student step that the section `distillation` describes.
    distils: ClassVar[bool] = False
    #: Whether it has iterations after its construction.
    trains: ClassVar[bool] = True
    #: Whether it learns the ranges of quantizers by gradients.
    learns_ranges: ClassVar[bool] = True
    #: The sections of `MethodSettings` that it reads.
    sections: ClassVar[tuple[str, ...]] = ()
    #: Fields of the quantization that it replaces by rules of its own.
    fixed_ranges: ClassVar[Mapping[str, str]] = {}
    #: Whether it needs batch normalisation in the float network, to match its statistics or to
    #: compare what enters it.
    needs_statistics: ClassVar[bool] = False
    #: Whether several processes may run it together, see `fdda_ext.distribution`.
    distributed: ClassVar[bool] = False

    student: GraphModule
    quantization: QuantizationConfig
    iterations: int = 0

    @property
    def made_images(self) -> int:
        """How many images it has made for the student so far."""
        return 0

    @property
    def part(self) -> str:
        """What it is at, in a word or two for the progress bar."""
        return ""

    @classmethod
    def observes(cls, settings: MethodSettings) -> bool:
        """Whether it finds activation ranges as moving averages over batches."""
        return False

    @abstractmethod
    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        """Build the student of ``problem``; ``settings`` holds a section for every method."""

    def step(self, iteration: int) -> Mapping[str, Tensor]:
        """Do iteration ``iteration``; return scalar metrics."""
        raise NotImplementedError(f"{type(self).__name__} does not train")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings, nested in dictionaries and lists."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def save_artifacts(self, folder: Path) -> None:  # noqa: B027  (optional for a method)
        """Write what is worth keeping besides the student; of several processes, the first does."""
