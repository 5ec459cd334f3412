"""Compare an iteration of FDDA with plain PyTorch: ResNet-18 at 224x224, the paper's batches.

The plain version runs generator and teacher once for each of the two batches, stores upsampled
images, and uses eager losses and fake quantization."""

from collections.abc import Callable, Mapping
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fdda_ext.data import Augmentation
from fdda_ext.methods import FDDA, DistillationConfig, FDDAConfig, MethodSettings, Problem
from fdda_ext.models import open_model
from fdda_ext.quantization import QuantizationConfig
from fdda_ext.statistics import BNSCentres, capture, compute_centres
from fdda_ext.synthesis import ConditionalGenerator

#: Number of classes. An iteration takes the same time with 1000.
CLASSES = 64


def eager_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None = None
) -> Tensor:
    if axis is not None:
        along = [-1 if d == axis else 1 for d in range(x.dim())]
        scale, zero_point = scale.view(along), zero_point.view(along)
    clamped = (x / scale + zero_point).clamp(low, high)
    return (clamped + (clamped.round() - clamped).detach() - zero_point) * scale


def plain_generate(generator: ConditionalGenerator, noise: Tensor, labels: Tensor) -> Tensor:
    def normalise(norm: torch.nn.Module, x: Tensor) -> Tensor:
        x = F.batch_norm(x, None, None, training=True, eps=norm.eps)
        return norm.scale(labels)[:, :, None, None] * x + norm.shift(labels)[:, :, None, None]

    def upsampled(conv: torch.nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias, padding=1)

    x = generator.project(noise).unflatten(1, (-1, generator.initial_size, generator.initial_size))
    x = normalise(generator.norm_a, x)
    x = F.leaky_relu(normalise(generator.norm_b, upsampled(generator.conv_b, x)), 0.2)
    x = F.leaky_relu(normalise(generator.norm_c, upsampled(generator.conv_c, x)), 0.2)
    return F.batch_norm(torch.tanh(generator.to_image(x)), None, None, training=True)


def distance(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    x_variance, x_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return F.mse_loss(x_mean, mean) + F.mse_loss(x_variance, variance)


class PlainFDDA(FDDA):
    """A direct implementation of the paper, with the same random numbers as FDDA."""

    def generator_step(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        config, first, batch = self.config, self.first_layer, self.config.batch
        labels_a = self.draw_labels(batch)
        class_b = self.draw_classes(iteration)
        noise = torch.randn(
            (2 * batch, self.generator.latent_dim), generator=self.random, device=labels_a.device
        )
        images_a = plain_generate(self.generator, noise[:batch], labels_a)
        seen_a = capture(self.problem.teacher, images_a)
        pairs = zip(seen_a.inputs, *self.running, strict=True)
        bns = torch.stack([distance(x, m[0], v[0]) for x, m, v in pairs]).mean()

        labels_b = class_b.expand(batch)
        images_b = plain_generate(self.generator, noise[batch:], labels_b)
        seen_b = capture(self.problem.teacher, images_b)
        centres = [[t[class_b[0]] for t in part[first:]] for part in self.centres.statistics]
        centralised = torch.stack(
            [distance(x, m, v) for x, m, v in zip(seen_b.inputs[first:], *centres, strict=True)]
        ).mean()
        noisy = []
        for part, std in zip(
            centres, (config.distortion.mean_std, config.distortion.variance_std), strict=True
        ):
            sizes = [len(t) for t in part]
            drawn = torch.randn((1, sum(sizes)), generator=self.random, device=labels_a.device)
            shares = drawn[0].split(sizes)
            noisy.append([t + std * e for t, e in zip(part, shares, strict=True)])
        distorted = torch.stack(
            [distance(x, m, v) for x, m, v in zip(seen_b.inputs[first:], *noisy, strict=True)]
        ).mean()
        classification = 0.5 * (
            F.cross_entropy(seen_a.logits, labels_a) + F.cross_entropy(seen_b.logits, labels_b)
        )
        loss = (
            config.classification_weight * classification
            + config.bns_weight * bns
            + config.distorted_weight * distorted
            + config.centralised_weight * centralised
        )
        self.generator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.generator_optimizer.step()
        return {"generator": loss.detach()}, images_a.detach(), labels_a

    def student_step(self, images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        with mock.patch("fdda_ext.quantization.quantizer.fake_quantize", eager_fake_quantize):
            return super().student_step(images, labels)


def all_trusted(*arguments: object) -> BNSCentres:
    """Mark all centres as correct; a teacher with random weights classifies no image correctly."""
    centres = compute_centres(*arguments)
    return BNSCentres(centres.statistics, torch.ones_like(centres.correct))


def build(
    method: type[FDDA],
    device: str,
    precision: torch.dtype = torch.float32,
    cuda_graphs: bool = True,
) -> FDDA:
    torch.manual_seed(0)
    teacher = open_model("torchvision:resnet18", weights="none", num_classes=1000).network
    teacher = teacher.eval().requires_grad_(False).to(device)
    images = torch.randn(CLASSES, 3, 224, 224, device=device)
    if method is FDDA:
        teacher.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    problem = Problem(
        teacher,
        CLASSES,
        images,
        torch.arange(CLASSES, device=device),
        Augmentation(),
        QuantizationConfig(),
        seed=0,
        precision=precision,
        cuda_graphs=cuda_graphs,
    )
    settings = MethodSettings(
        DistillationConfig(),
        FDDAConfig(warmup_iterations=0, misclassified_iterations=0, ranges_from="calibration"),
    )
    with mock.patch("fdda_ext.methods.fdda.compute_centres", all_trusted):
        return method(problem, settings)


def losses(method: FDDA, iterations: int) -> Tensor:
    """Return the losses of generator and student, ``[iterations, 2]``."""
    found = [method.step(iteration) for iteration in range(iterations)]
    return torch.tensor([[m["generator"].item(), m["student"].item()] for m in found])


def bench_iteration(compare, device):
    methods = {
        "fdda_ext": build(FDDA, device),
        "bfloat16": build(FDDA, device, torch.bfloat16),
        "plain": build(PlainFDDA, device, cuda_graphs=False),
    }
    if device == "cuda":
        methods["bfloat16 without graphs"] = build(FDDA, device, torch.bfloat16, False)
    iterations = 2 if device == "cpu" else 6  # on a GPU a CUDA graph replays the last ones
    found = {name: losses(method, iterations) for name, method in methods.items()}
    expected = found.pop("plain")
    # On a GPU, float32 convolutions run in TF32, whose rounding depends on the algorithm.
    close = 1e-3 if device == "cpu" else 1e-2
    for name, values in found.items():
        rtol = close if name == "fdda_ext" else 5e-2
        torch.testing.assert_close(values[:2], expected[:2], rtol=rtol, atol=0)
        # Adam turns a rounding error into a full step, so later losses agree only roughly.
        torch.testing.assert_close(values, expected, rtol=0.3, atol=0)

    def step(method: FDDA) -> Callable[[], object]:
        return lambda: method.step(2)

    peers = {name: step(method) for name, method in methods.items()}
    rounds = 4 if device == "cpu" else 20
    compare("FDDA iteration, ResNet-18, 16 + 16 images of 224x224", peers, rounds=rounds)
