"""The conditional generator: image sizes, statistics, labels, and its layers."""

import pytest
import torch
from torch.nn import functional as F

from fdda_ext.errors import UsageError
from fdda_ext.synthesis import ConditionalGenerator, GeneratorConfig
from fdda_ext.synthesis.generator import ConditionalBatchNorm, UpsampledConv2d


@pytest.mark.parametrize("size", [4, 30, 32, 33, 47, 64])
def test_generator_makes_images_of_any_size(size):
    generator = ConditionalGenerator(7, size, GeneratorConfig(channels=8))
    images = generator.sample(torch.arange(6), torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, size, size)


def test_images_have_zero_mean_and_unit_variance_per_colour():
    generator = ConditionalGenerator(7, 32, GeneratorConfig(channels=8))
    images = generator.sample(torch.arange(7), torch.Generator().manual_seed(0))
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        images.var(dim=(0, 2, 3), unbiased=False), torch.ones(3), atol=1e-2, rtol=0
    )


def test_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        generator = ConditionalGenerator(1000, 224)
    parameters = sum(p.numel() for p in generator.parameters())
    linear = sum(p.numel() for p in generator.project.parameters())
    assert linear == 101 * 128 * 56 * 56  # 40.5 million
    assert 41.3e6 < parameters < 41.5e6


def test_images_depend_on_label_and_noise():
    generator = ConditionalGenerator(4, 16, GeneratorConfig(channels=8))
    with torch.no_grad():
        generator.norm_b.shift.weight[1] += 1.0
    noise = torch.randn(2, 100)
    labels = torch.tensor([0, 0])
    same = generator(noise, labels)
    assert not torch.equal(same[0], same[1])
    other = generator(noise, torch.tensor([0, 1]))
    assert not torch.allclose(same[1], other[1], atol=1e-3)
    generator(noise, torch.tensor([1, 2])).square().mean().backward()
    touched = generator.norm_c.scale.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True, True, False]


def test_upsampled_convolution_equals_its_definition():
    torch.manual_seed(0)
    layer = UpsampledConv2d(3, 5).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    weight = torch.randn_like(expected)
    leaves = (x, layer.weight, layer.bias)
    for got, want in zip(
        torch.autograd.grad((layer(x) * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_conditional_normalisation_equals_its_definition():
    torch.manual_seed(0)
    layer = ConditionalBatchNorm(5, 3, eps=0.8).double()
    torch.nn.init.normal_(layer.scale.weight)
    torch.nn.init.normal_(layer.shift.weight)
    x, labels = torch.randn(4, 5, 3, 3, dtype=torch.float64), torch.tensor([2, 0, 0, 1])
    normalised = F.batch_norm(x, None, None, training=True, eps=0.8)
    expected = (
        normalised * layer.scale(labels)[:, :, None, None] + layer.shift(labels)[:, :, None, None]
    )
    torch.testing.assert_close(layer(x, labels, torch.zeros(4, dtype=torch.int64), 1), expected)


def test_two_batches_in_one_pass_equal_two_passes():
    generator = ConditionalGenerator(4, 16, GeneratorConfig(channels=8))
    noise, labels = torch.randn(6, 100), torch.tensor([0, 1, 2, 3, 3, 3])
    expected = torch.cat([generator(noise[:3], labels[:3]), generator(noise[3:], labels[3:])])
    torch.testing.assert_close(generator(noise, labels, 2), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(generator(noise, labels), expected, rtol=1e-2, atol=1e-2)


def test_bad_sizes_are_refused():
    with pytest.raises(UsageError, match="image_size at least 4, got 3"):
        ConditionalGenerator(4, 3)
    with pytest.raises(UsageError, match="channels at least 2, got 1"):
        GeneratorConfig(channels=1)
    with pytest.raises(UsageError, match="hidden_eps above 0"):
        GeneratorConfig(hidden_eps=0.0)
