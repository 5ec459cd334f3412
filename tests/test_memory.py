"""Estimated memory of a run against the real one, and batches that are computed in parts."""

import gc
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_fdda import problem, settings

from fdda_ext.engine import LiveTensors, parts_of
from fdda_ext.errors import UsageError
from fdda_ext.methods import FDDA, MemoryEstimate, build_method, estimate_memory
from fdda_ext.methods.memory import MemoryPhase
from fdda_ext.synthesis import ConditionalGenerator, GeneratorConfig

PROGRAMS = Path(__file__).parent.parent / "python"


def test_tensors_are_counted_while_they_live():
    with LiveTensors() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)  # shares memory
        z = (y + 1).relu_()
        assert live.now == 8000
        del x, z
        assert live.now == 4000  # y holds it
        del y
    assert (live.now, live.peak) == (0, 8000)


def test_parts_have_sixteen_large_images_on_a_cpu():
    sizes = [(32, 224**2, 2), (33, 224**2, 3), (1, 1000**2, 1), (250, 32**2, 1)]
    assert [parts_of(n, pixels, torch.device("cpu")) for n, pixels, _ in sizes] == [
        parts for _, _, parts in sizes
    ]
    assert parts_of(250, 224**2, torch.device("cuda")) == 1


def test_steps_in_parts_equal_steps_on_the_whole_batch():
    """Compute the generator's batches one after the other, and three student images at a time."""
    whole = problem(right=True)
    parts = replace(whole, images_at_once=3)
    methods = [FDDA(p, settings()) for p in (whole, parts)]
    assert [method.one_batch_at_a_time for method in methods] == [False, True]
    # At first, classes without a centre are pulled towards noise, which both draw alike.
    for iteration in range(methods[0].iterations):
        found, other = (method.step(iteration) for method in methods)
        assert found.keys() == other.keys()
        for name, value in found.items():
            torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-4)
    first = [FDDA(p, settings()).generator_gradients(0) for p in (whole, parts)]
    for name in first[0]:
        torch.testing.assert_close(first[1][name], first[0][name])
    assert torch.equal(*(method.random.get_state() for method in methods))


def test_gradients_in_parts_equal_those_of_the_whole_batch():
    gradients = []
    for at_once in (None, 3):
        method = FDDA(replace(problem(right=True), images_at_once=at_once), settings())
        method.generator_gradients(0)
        images, labels = method.problem.images, method.problem.labels
        method.trainer.gradients(images, labels, share=1.0, regulariser=None)
        for network in (method.generator, method.student):
            found = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            gradients.append(torch.cat(found))
    for whole, part in zip(gradients[:2], gradients[2:], strict=True):
        assert (part - whole).norm() <= 1e-3 * whole.norm()


def test_class_maps_have_at_most_eight_by_eight_positions():
    config = GeneratorConfig(channels=4, class_maps=True)
    sizes = {}
    for image_size in (16, 32, 224):
        generator = ConditionalGenerator(5, image_size, config)
        sizes[image_size] = generator.class_maps.weight.shape[1]
        images = generator.sample(torch.tensor([0, 4]), torch.Generator().manual_seed(0))
        assert images.shape == (2, 3, image_size, image_size)
        images.square().sum().backward()
        assert generator.class_maps.weight.grad[4].any()
        assert not generator.class_maps.weight.grad[1].any()
    assert sizes == {16: 4 * 4**2, 32: 4 * 8**2, 224: 4 * 8**2}


@pytest.mark.parametrize("name", ["fdda", "distill"])
def test_estimates_are_close_to_the_bytes_of_live_tensors(name):
    """Compare the estimate, without its safety margin, with the peak of live tensors."""
    given, config = problem(right=True), settings({"real_batch": 64, "generated_batch": 64})
    given = replace(given, images=given.images.repeat(32, 1, 1, 1), labels=given.labels.repeat(32))
    config = replace(config, fdda=replace(config.fdda, batch=128))
    estimate = estimate_memory(name, given, config)
    with LiveTensors() as live:
        method = build_method(name, given, config)
        gc.collect()
        live.peak = live.now
        for iteration in range(method.iterations):
            method.step(iteration)
    counted = estimate.kept + estimate.largest.bytes
    assert counted == pytest.approx(live.peak, rel=0.3)


def test_the_error_for_a_run_that_does_not_fit_names_the_best_remedy():
    phases = [
        MemoryPhase("the evaluation", 0, 1e6, 250, "test_batch", 250),
        MemoryPhase("a student step", 1e8, 1e8, 16, "images_at_once", 16),
    ]
    estimate = MemoryEstimate(present=10**9, kept=10**8, phases=phases)
    assert estimate.describe(10**10) == "memory: needs about 3.0 GB; 11.0 GB are available"
    estimate.check(2 * 10**9)
    estimate.check(None)
    with pytest.raises(
        UsageError, match=r"fits 2.0 GB, got .* 3.0 GB, .* a student step; lower images_at_once"
    ) as refused:
        estimate.check(10**9)
    assert str(refused.value).endswith("from 16 to 7")
    with pytest.raises(UsageError, match="use a smaller model or smaller images"):
        estimate.check(10**8)


def test_the_memory_of_methods_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROGRAMS)
    arguments = [
        *("--model=glyphs_mobilenet", "--image-size=16", "--classes=8", "--methods=minmax"),
        *("--iterations=1", f"--out={tmp_path}"),
    ]
    monkeypatch.setattr(sys, "argv", [str(PROGRAMS / "memory.py"), *arguments])
    runpy.run_path(str(PROGRAMS / "memory.py"), run_name="__main__")
    assert "glyphs_mobilenet, 8 classes, 16x16" in capsys.readouterr().out
    rows = (tmp_path / "memory.csv").read_text().splitlines()
    assert rows[0].startswith("method,estimate GB,peak GB,checkpoint MB")
    name, estimate, peak, checkpoint, *_ = rows[1].split(",")
    assert name == "minmax"
    assert float(estimate) == pytest.approx(float(peak), rel=0.5)
    assert float(checkpoint) > 0
    assert json.loads(checkpoint) < 10
