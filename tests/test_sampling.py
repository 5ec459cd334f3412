"""Samples of a data set, and the standard error of an accuracy over a sample."""

import json
import math

import pytest
import torch
from torch import nn

from fdda_ext.commands import compare, evaluate, train
from fdda_ext.data import load_dataset
from fdda_ext.data.sampling import fair_sample
from fdda_ext.engine import Accuracy, BatchSource, evaluate as measure, standard_error

SKEWED = torch.cat([torch.full((n,), k) for k, n in enumerate([1, 2, 3, 50, 944])])
LABELS = {
    "classes in turn": torch.arange(1000).repeat_interleave(50),
    "classes mixed": torch.arange(50_000) % 1000,
    "random": torch.randint(0, 10, (10_000,), generator=torch.Generator().manual_seed(0)),
    "skewed": SKEWED,
    "many small classes": torch.cat([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 1001)]),
    "one class": torch.zeros(9, dtype=torch.int64),
    "labels with gaps": torch.tensor([7, 7, 7, 7, 40, 40]),
}


@pytest.mark.parametrize("name", LABELS)
def test_every_class_has_its_share_of_every_sample(name):
    labels = LABELS[name]
    n = len(labels)
    order = fair_sample(labels, n)
    assert torch.equal(order.sort().values, torch.arange(n))
    sizes = torch.bincount(labels).double()
    for count in {1, 2, 5, 10, 71, 100, 500, 999, 1000, 1500, n // 2, n - 1} & set(range(1, n)):
        sample = fair_sample(labels, count)
        assert torch.equal(sample, order[:count]), "a smaller sample is part of a larger one"
        found = torch.bincount(labels[sample], minlength=len(sizes))
        assert (found - count * sizes / n).abs().max() < 1.5
        if count % 1000 == 0 and name.startswith("classes"):
            assert set(found.tolist()) == {count // 1000}


def test_periodic_labels_do_not_bias_the_sample():
    # A regular distance of 10 would find only one class.
    labels = torch.arange(1000) % 10
    assert torch.bincount(labels[fair_sample(labels, 100)]).tolist() == [10] * 10
    # The sample does not take the first images of a class.
    labels = torch.arange(10).repeat_interleave(100)
    places = fair_sample(labels, 300) % 100
    assert 40 < places.double().mean() < 60
    assert places.double().std() > 25


def test_the_sample_is_the_same_on_every_machine():
    assert fair_sample(torch.arange(1000) % 7, 8).tolist() == [
        166,
        806,
        602,
        118,
        522,
        800,
        297,
        348,
    ]
    assert fair_sample(torch.tensor([0, 1]), 5).numel() == 2
    assert fair_sample(torch.empty(0, dtype=torch.int64), 5).numel() == 0


def test_samples_of_images_are_nested_sorted_and_do_not_depend_on_the_seed():
    small, large, other = (
        load_dataset("glyphs", "test", limit=limit, seed=seed)
        for limit, seed in ((71, 0), (142, 0), (71, 1))
    )
    assert len(small) == 71
    assert set(small._indices.tolist()) < set(large._indices.tolist())
    assert torch.equal(small._indices, other._indices)
    assert torch.equal(small._indices, small._indices.sort().values)
    assert small.labels.unique().numel() == 71
    assert torch.equal(torch.bincount(large.labels), torch.full((71,), 2))
    assert small.whole == len(load_dataset("glyphs", "test")) == 10650


def test_standard_error_is_the_spread_of_samples():
    generator = torch.Generator().manual_seed(0)
    right = torch.arange(1000) < 812
    means = torch.stack(
        [
            right[torch.randperm(1000, generator=generator)[:400]].double().mean()
            for _ in range(4000)
        ]
    )
    assert standard_error(81.2, 400, 1000) == pytest.approx(100 * float(means.std()), rel=0.05)
    assert standard_error(81.2, 5000, 10**12) == pytest.approx(
        100 * math.sqrt(0.812 * 0.188 / 5000)
    )
    assert standard_error(50, 10, 10) == standard_error(50, 10, 0) == 0


def test_accuracies_over_a_sample_have_a_standard_error():
    whole, sample = Accuracy(81.2, 99.0, 1000), Accuracy(81.2, 99.0, 400, 1000)
    assert (whole.is_sample, whole.standard_error) == (False, 0)
    assert str(whole) == "top-1 81.20 %, top-5 99.00 %, 1000 images"
    assert sample.is_sample
    assert sample.standard_error == standard_error(81.2, 400, 1000)
    assert str(sample) == (
        "top-1 81.20 ± 1.51 %, top-5 99.00 ± 0.39 % (standard error; 400 of 1000 images)"
    )

    class Guess(nn.Module):
        def forward(self, images):
            return torch.eye(71)[torch.zeros(len(images), dtype=torch.int64)]

    for limit, of in ((142, 10650), (None, 0)):
        data = load_dataset("glyphs", "validation" if limit is None else "test", limit=limit)
        data.pixels = lambda index: torch.zeros(3, 8, 8, dtype=torch.uint8)
        accuracy = measure(Guess(), BatchSource(data, 1000))
        assert (accuracy.count, accuracy.of) == (len(data), of)
        assert accuracy.top1 == pytest.approx(100 / 71)


def test_every_printed_accuracy_over_a_sample_has_its_standard_error(tmp_path, capsys):
    out = tmp_path / "out"
    compare.main(["--methods=minmax", "--seeds=0", f"--out={out}", "--", "--test_limit=71"])
    folder = out / "glyphs_resnet-W4A4" / "minmax-seed0"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["images"], summary["of"]) == (71, 10650)
    error = f"{standard_error(summary['top1'], 71, 10650):.2f}"
    top1 = f"{summary['top1']:.2f} ± {error}"
    assert f"seed 0: {top1} %" in capsys.readouterr().out
    assert f"71 of 10650 images: one accuracy has a standard error of at most {error}" in (
        " ".join((out / "comparison.md").read_text().split())
    )
    table = (folder / "table.txt").read_text()
    assert top1 in table
    assert "71 of 10650 test images" in " ".join(table.split())
    assert f"top-1 {summary['float_top1']:.2f} ± " in (folder.with_suffix(".log")).read_text()
    evaluate.main([f"--run={folder}", "--test_limit=71", "--threads=1"])
    assert f"top-1 {top1} %" in capsys.readouterr().out
    from fdda_ext.commands import visualize

    visualize.main([str(folder), "--images=20", "--threads=1"])
    report = (folder / "report.html").read_text()
    assert f"{top1} %" in report
    assert "71 of 10650 test images" in report
    assert "20 test images, a sample of 10650" in report
    # A summary without "of" counts as one over all images.
    del summary["of"]
    row = train.Row(**{k: v for k, v in summary.items() if k != "config"})
    assert "±" not in train.render_rows([row], "W4A4").columns[1]._cells[0]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "standard error" not in compare.write_results(
        compare.parse(["--methods=minmax", "--seeds=0", f"--out={out}"])[0],
        {"glyphs_resnet/minmax": 1.0},
    )
