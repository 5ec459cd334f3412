"""Capture of BN statistics, BNS centres, and the losses of FDDA against formulas."""

import pytest
import torch
from torch import nn

from fdda_ext.errors import UsageError
from fdda_ext.statistics import (
    Distortion,
    LayerStatistics,
    bns_loss,
    capture,
    centralised_and_distorted_targets,
    compute_centres,
    first_class_layer,
    load_centres,
    noise_pull_loss,
    noise_pull_targets,
    running_statistics,
    save_centres,
)


def small_network(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def plain_distance(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Return MSE(mu, mean) + MSE(v, variance) of a layer's input [N, C, H, W], as in the paper."""
    mu = x.mean(dim=(0, 2, 3))
    v = x.var(dim=(0, 2, 3), unbiased=False)
    return ((mu - mean) ** 2).mean() + ((v - variance) ** 2).mean()


def test_capture_keeps_bn_inputs_in_order_and_leaves_no_hook():
    network = small_network()
    images = torch.randn(4, 3, 8, 8)
    seen = capture(network, images)
    assert [x.shape[1] for x in seen.inputs] == [6, 8]
    assert torch.equal(seen.inputs[0], network[0](images))
    assert torch.equal(seen.logits, network(images))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_capture_refuses_network_without_batch_norm():
    with pytest.raises(UsageError, match="at least one batch-normalisation layer"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 4, 4))


def test_running_statistics_refuses_layer_without_them():
    with pytest.raises(UsageError, match="track running"):
        running_statistics([nn.BatchNorm2d(3, track_running_stats=False)])


@pytest.mark.parametrize(
    ("layers", "first"), [(20, 8), (27, 12), (52, 24), (53, 25), (1, 0), (3, 0)]
)
def test_first_class_layer_is_that_of_the_published_networks(layers, first):
    assert first_class_layer(layers) == first


def test_bns_loss_equals_the_formula_with_gradient():
    network = small_network()
    images = torch.randn(6, 3, 8, 8, requires_grad=True)
    seen = capture(network, images)
    running = running_statistics(seen.layers)
    loss = bns_loss(seen.inputs, running)
    plain = sum(
        plain_distance(x, layer.running_mean, layer.running_var)
        for x, layer in zip(seen.inputs, seen.layers, strict=True)
    ) / len(seen.inputs)
    torch.testing.assert_close(loss, plain)
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    (expected,) = torch.autograd.grad(plain, images)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_class_losses_equal_the_formula_for_each_class():
    torch.manual_seed(1)
    inputs = [torch.randn(6, 4, 5, 5), torch.randn(6, 7, 3, 3)]
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    centres = LayerStatistics(
        [torch.randn(3, 4), torch.randn(3, 7)], [torch.rand(3, 4), torch.rand(3, 7)]
    )
    share = torch.tensor([0.5, 0.0, 0.5])
    random = torch.Generator().manual_seed(3)
    targets = centralised_and_distorted_targets(index, centres, share, Distortion(0.0, 0.0), random)
    together = targets.distances(inputs)
    centralised, distorted = together.mean(1)
    # Layer by layer, the result is bit-identical.
    alone = [targets.distances([x], layer) for layer, x in enumerate(inputs)]
    assert torch.cat(alone, 1).equal(together)
    plain = sum(
        0.5 * plain_distance(x[index == k], mean[k], variance[k])
        for x, mean, variance in zip(inputs, *centres, strict=True)
        for k in (0, 2)
    ) / len(inputs)
    torch.testing.assert_close(centralised, plain)
    # Without noise the two losses are equal.
    torch.testing.assert_close(distorted, centralised)


def test_distorted_loss_at_the_centre_is_the_variance_of_the_noise_on_average():
    x = torch.randn(8, 512, 4, 4)
    centre = LayerStatistics(
        [x.mean(dim=(0, 2, 3))[None]], [x.var(dim=(0, 2, 3), unbiased=False)[None]]
    )
    index, share = torch.zeros(8, dtype=torch.int64), torch.ones(1)
    random = torch.Generator().manual_seed(0)
    values = [
        centralised_and_distorted_targets(index, centre, share, Distortion(0.5, 1.0), random)
        .distances([x])
        .mean(1)
        for _ in range(40)
    ]
    assert max(float(centralised) for centralised, _ in values) < 1e-10
    mean = sum(float(distorted) for _, distorted in values) / len(values)
    assert mean == pytest.approx(0.5**2 + 1.0**2, rel=0.05)


def test_noise_pull_is_twice_the_distance_to_standard_normal_noise():
    x = [torch.zeros(4, 256, 3, 3)]
    random = torch.Generator().manual_seed(0)
    index, share = torch.zeros(4, dtype=torch.int64), torch.ones(1)
    like = LayerStatistics([torch.zeros(1, 256)], [torch.ones(1, 256)])

    def loss(share: torch.Tensor) -> float:
        return float(noise_pull_loss(noise_pull_targets(index, like, share, random).distances(x)))

    values = [loss(share) for _ in range(40)]
    # The statistics are 0, so each term is the mean square of standard normal noise, which is 1.
    assert sum(values) / len(values) == pytest.approx(2 * (1 + 1), rel=0.05)
    assert loss(torch.zeros(1)) == 0


def test_centres_are_those_of_each_class_alone(tmp_path):
    network = small_network(num_classes=40)
    images = torch.randn(120, 3, 8, 8)
    labels = torch.arange(120) % 40
    predicted = network(images).argmax(1)
    labels[80:] = predicted[80:]  # some classes have only misclassified images
    right = labels == predicted
    centres = compute_centres(network, images, labels, 40)
    assert 0 < int(centres.correct.sum()) < 40
    for k in (0, 39, *labels[80:82].tolist()):
        own = labels == k
        assert bool(centres.correct[k]) == bool(right[own].any())
        own = own & right if centres.correct[k] else own
        seen = capture(network, images[own])
        for layer, x in enumerate(seen.inputs):
            torch.testing.assert_close(centres.statistics.means[layer][k], x.mean(dim=(0, 2, 3)))
            torch.testing.assert_close(
                centres.statistics.variances[layer][k], x.var(dim=(0, 2, 3), unbiased=False)
            )

    save_centres(centres, tmp_path / "centres.safetensors")
    loaded = load_centres(tmp_path / "centres.safetensors")
    assert torch.equal(loaded.correct, centres.correct)
    for stored, own in zip(loaded.statistics.means, centres.statistics.means, strict=True):
        assert torch.equal(stored, own)


def test_centres_name_the_class_without_an_image():
    with pytest.raises(UsageError, match="got none of class 2"):
        compute_centres(small_network(), torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), 5)


def test_damaged_centres_file_is_refused(tmp_path):
    path = tmp_path / "centres.safetensors"
    path.write_bytes(b"not a tensor file")
    with pytest.raises(UsageError, match="file of BNS centres"):
        load_centres(path)
