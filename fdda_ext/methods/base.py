"""The input and the interface of every method."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..data import Augmentation
from ..distribution import world_size
from ..engine import parts_of
from ..errors import UsageError
from ..image_size import ImageSize, to_image_size
from ..quantization import QuantizationConfig, calibrate, correct_biases_
from ..quantization.equalisation import equalise_
from ..quantization.prepare import activations, quantize_traced, trace_unpadded

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["Method", "MethodConfig", "Phase", "Problem"]


#: Largest number of images that set the scales of channels.
_EQUALISED = 64


@dataclass(frozen=True)
class Problem:
    """A trained network to quantize and the data for it.

    Attributes:
        teacher: Trained network in evaluation mode, without gradients.
        num_classes: Number of classes, K.
        images: Calibration images ``[n, C, H, W]``, normalised.
        labels: Classes of the images, int64 ``[n]``.
        augmentation: Augmentation for calibration and generated images.
        quantization: Bits, grid and ranges of the student.
        seed: Seed for all random numbers.
        precision: Precision of teacher and generator. With bfloat16 they run under autocast;
            statistics, losses, the student and all trained parameters stay in float32.
        pixel_range: Smallest and largest value of each channel of a normalised image, both
            ``[C, 1, 1]``; None if unknown.
        cuda_graphs: Whether steps on a GPU are replayed as CUDA graphs.
        images_at_once: Largest number of images in one training pass, where splitting a batch
            changes only the order of sums; None if `fdda_ext.engine.parts_of` decides.
        large_images: Calibration images in the size that the student is for, if ``images`` are
            smaller to save time and memory in training; otherwise None.
        views: Number of calibration images for each real one: the real image and random views of
            it. They are neighbours in ``images``.
        equalisation: Strength of the equalisation of channels, see
            `fdda_ext.quantization.equalisation`; None for none.
        bias_correction: Whether biases are corrected after calibration, see
            `fdda_ext.quantization.bias_correction`.
        traced: Graphs of teachers for image shapes, from which `student` builds students quickly.
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
    large_images: Tensor | None = None
    views: int = 1
    equalisation: float | None = None
    bias_correction: bool = False
    traced: dict[tuple[nn.Module, torch.Size, float | None], GraphModule] = field(
        default_factory=dict, repr=False, compare=False
    )

    def autocast(self) -> torch.autocast:
        """Return the context in which teacher and generator run."""
        enabled = self.precision is not torch.float32
        return torch.autocast(self.device.type, dtype=self.precision, enabled=enabled)

    @property
    def full_size_images(self) -> Tensor:
        """Calibration images in the size that the student is for, ``[n, C, H, W]``."""
        return self.images if self.large_images is None else self.large_images

    @property
    def full_image_size(self) -> ImageSize:
        """Height and width of the images that the student is for."""
        return to_image_size(*self.full_size_images.shape[-2:])

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the images in training."""
        return to_image_size(*self.images.shape[-2:])

    @property
    def channels(self) -> int:
        """Number of image channels, C."""
        return int(self.images.shape[1])

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.images.device

    @property
    def replays(self) -> bool:
        """Whether steps become CUDA graphs: only on a GPU, and with a single rank."""
        return self.cuda_graphs and self.device.type == "cuda" and world_size() == 1

    def parts(self, images: int) -> int:
        """Return into how many parts a batch of ``images`` is split to save memory."""
        if self.images_at_once is not None:
            return -(-images // self.images_at_once)
        return parts_of(images, self.images[0, 0].numel(), self.device)

    def network(self) -> GraphModule:
        """Copy the teacher into a graph with equalised channels."""
        size, strength = self.full_size_images.shape[1:], self.equalisation
        key = (self.teacher, size, strength)
        if key not in self.traced:
            network = trace_unpadded(self.teacher, self.full_size_images[:1])
            if strength is not None:
                some = self.with_images(_EQUALISED).images
                equalise_(network, activations(network, self.quantization), some, strength)
            self.traced[key] = network
        return copy.deepcopy(self.traced[key])

    def student(self) -> GraphModule:
        """Build a fake-quantized copy of the teacher, without ranges."""
        return quantize_traced(self.network(), self.quantization)

    def calibrate(self, student: GraphModule, images: Tensor | Sequence[Tensor]) -> None:
        """Set the ranges of ``student``, then correct its biases if `bias_correction` says so.

        Args:
            student: A student of this problem.
            images: Normalised images ``[n, C, H, W]``, or batches of them.
        """
        calibrate(student, images)
        if self.bias_correction:
            whole = images if isinstance(images, Tensor) else torch.cat(list(images))
            correct_biases_(student, whole)

    def with_images(self, count: int) -> Problem:
        """Return the same problem with ``count`` of its images, spread over all classes."""
        if count >= len(self.images):
            return self
        chosen = torch.arange(count, device=self.device) * len(self.images) // count
        large = None if self.large_images is None else self.large_images[chosen]
        return replace(
            self, images=self.images[chosen], labels=self.labels[chosen], large_images=large
        )

    def quickly_prepared(self) -> Problem:
        """Return the same problem with min-max ranges, for uses that do not depend on ranges."""
        quick = replace(self.quantization, weight_range="minmax", activation_range="minmax")
        return replace(self, quantization=quick)

    def random(self) -> torch.Generator:
        """Return a new random generator that starts from the seed."""
        return torch.Generator(self.device).manual_seed(self.seed)


class Phase(NamedTuple):
    """A part of a method's schedule.

    Attributes:
        iterations: Number of iterations.
        prepares: Whether the first iteration also passes all calibration images through a network.
    """

    iterations: int
    prepares: bool = False


@dataclass(frozen=True)
class MethodConfig:
    """Base of the frozen dataclasses with the settings of a method."""

    #: Name of the method in messages.
    name: ClassVar[str]

    def check_not_negative(self, *names: str) -> None:
        """Refuse settings that are negative or not finite."""
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"{self.name}: expected {name} at least 0 and finite, got {getattr(self, name)}"
                )


class Method(ABC):
    """A way to obtain a quantized student.

    The constructor does everything except the training. Then `step` is called ``iterations`` times,
    0 for methods that only calibrate. `state_dict` holds everything that affects later steps, so a
    resumed run ends with bit-identical weights.
    """

    #: One line for ``--help`` and for tables.
    summary: ClassVar[str]
    #: Folder of its presets.
    presets: ClassVar[str] = "fdda"
    #: Whether it uses the calibration images; if not, it uses only their shape.
    real_images: ClassVar[bool] = True
    #: Whether it needs the labels of the calibration images.
    needs_labels: ClassVar[bool] = False
    #: Whether it takes student steps with the settings `distillation`.
    distils: ClassVar[bool] = False
    #: Whether it has iterations.
    trains: ClassVar[bool] = True
    #: Whether it learns ranges by gradients.
    learns_ranges: ClassVar[bool] = True
    #: Sections of `MethodSettings` that it reads.
    sections: ClassVar[tuple[str, ...]] = ()
    #: Fields of the quantization that it overrides, with the values that it uses.
    fixed_ranges: ClassVar[Mapping[str, str]] = {}
    #: Whether the teacher must have batch normalisation, for its statistics or its inputs.
    needs_statistics: ClassVar[bool] = False
    #: Whether it can correct biases after calibration; others learn or compute them themselves.
    corrects_biases: ClassVar[bool] = True
    #: Whether several ranks can run it together, see `fdda_ext.distribution`.
    distributed: ClassVar[bool] = False

    student: GraphModule
    quantization: QuantizationConfig
    iterations: int = 0

    @property
    def synthetic_images(self) -> int:
        """Number of synthetic images made for the student so far."""
        return 0

    @property
    def phases(self) -> list[Phase]:
        """Consecutive parts of the schedule, each with iterations of equal duration."""
        return [Phase(self.iterations)]

    @property
    def part(self) -> str:
        """Current part of the training in one or two words, for the progress bar."""
        return ""

    @classmethod
    def observes(cls, settings: MethodSettings) -> bool:
        """Return whether activation ranges are moving averages over batches."""
        return False

    @abstractmethod
    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        """Build the student of ``problem``; ``settings`` has a section for every method."""

    def step(self, iteration: int) -> Mapping[str, Tensor]:
        """Run iteration ``iteration``; return scalar metrics."""
        raise NotImplementedError(f"{type(self).__name__} does not train")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings, nested in dictionaries and lists."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""

    def save_artifacts(self, folder: Path) -> None:  # noqa: B027  (optional for a method)
        """Write further results; only the first rank calls this."""
