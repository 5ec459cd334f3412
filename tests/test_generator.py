"""The conditional generator: sizes, statistics of its images, dependence on the label."""

import pytest
import torch

from fdda_ext.errors import UsageError
from fdda_ext.synthesis import ConditionalGenerator, GeneratorConfig


@pytest.mark.parametrize("size", [4, 30, 32, 33, 47, 64])
def test_any_image_size(size):
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


def test_label_and_noise_both_matter_and_reach_the_gradient():
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


def test_bad_sizes_are_refused():
    with pytest.raises(UsageError, match="image_size at least 4, got 3"):
        ConditionalGenerator(4, 3)
    with pytest.raises(UsageError, match="channels at least 2, got 1"):
        GeneratorConfig(channels=1)
    with pytest.raises(UsageError, match="hidden_eps above 0"):
        GeneratorConfig(hidden_eps=0.0)
