"""Reports of runs: measurements, content, and display in a browser."""

import json
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from rich.console import Console

from fdda_ext.commands import export, train, visualize
from fdda_ext.data import load_dataset
from fdda_ext.engine import BatchSource
from fdda_ext.errors import UsageError
from fdda_ext.models import load_model
from fdda_ext.quantization.tracing import trace
from fdda_ext.statistics import LayerStatistics
from fdda_ext.visualization import (
    Predictions,
    bn_statistics,
    figures,
    judge,
    layer_sqnr,
    page,
    predict,
    statistics_distance,
)

#: Arguments for a short run with everything that a report can show.
ARGUMENTS = [
    "--threads=1",
    "--test_limit=71",
    "--baselines=[minmax]",
    "--settings.distillation.steps=6",
    "--settings.fdda.warmup_iterations=3",
    "--settings.fdda.generator.channels=4",
    "--settings.fdda.batch=8",
    "--evaluate_every=2",
    "--evaluate_limit=20",
]
ALWAYS = {
    "accuracy",
    "what-was-done",
    "quantization-error-by-layer",
    "predictions",
    "size",
    "bits-of-every-layer",
    "configuration",
}
OF_A_GENERATOR = {
    "accuracy-over-time",
    "losses",
    "generated-images",
    "bn-statistics-of-generated-images",
}


class Page(HTMLParser):
    """The content of an HTML page, which must be well-formed."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.words = ""
        text = path.read_text(encoding="utf-8")
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name == "src":
                self.sources.append(str(value))
            elif name in ("href", "srcset", "data", "action") or name.startswith("on"):
                self.links.append(f"{name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with the report that training wrote."""
    before = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("report") / "run"
    train.main([*ARGUMENTS, f"--out={folder}"])
    torch.set_num_threads(before)
    return folder


# ---- the pages ----------------------------------------------------------------------------------


def test_training_writes_a_self_contained_report(run):
    found = Page(run / "report.html")
    assert set(found.ids) == ALWAYS | OF_A_GENERATOR
    assert not found.links
    assert "script" not in found.tags
    assert "url(" not in (run / "report.html").read_text()
    assert len(found.sources) == found.tags.count("img") == 6
    assert all(source.startswith("data:image/") for source in found.sources)
    for words in (
        "fdda on glyphs_resnet, W4A4",
        "minmax",
        "71 classes",
        "blocks.3.conv2",
        "seed: 0",
        "of the 71 classes in them",
    ):
        assert words in found.words, words


def test_reports_of_baselines_have_no_sections_without_data(run):
    folder = run / "baselines" / "minmax"
    visualize.main([str(folder), "--images=30"])
    found = Page(folder / "report.html")
    assert set(found.ids) == ALWAYS
    assert "of 30 test images" in found.words
    assert "minmax on glyphs_resnet" in found.words


def test_after_export_the_report_also_has_size_and_speed(run):
    before = (run / "report.html").read_text()
    visualize.main([str(run)])
    assert (run / "report.html").read_text() == before
    export.main([f"--run={run}"])
    visualize.main([str(run)])
    found = Page(run / "report.html")
    (run / "model.int4.safetensors").unlink()
    assert set(found.ids) == (ALWAYS - {"size"}) | OF_A_GENERATOR | {"size-and-speed"}
    assert "integer program" in found.words


def test_a_failed_report_gives_a_warning_and_the_run_is_finished(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no [font]\nfound")

    monkeypatch.setattr(train, "write_report", fail)
    quick = ["--method=minmax", "--baselines=[]", "--test_limit=71", f"--out={tmp_path / 'run'}"]
    config, stored = train.parse_arguments(quick)
    console = Console(record=True, width=200)
    train.run(config, stored, console)
    (line,) = [x for x in console.export_text().splitlines() if "warning" in x]
    assert line.strip() == "warning: no report.html (RuntimeError: no [font] found)"
    assert (tmp_path / "run" / "summary.json").exists()
    # With --no-report there is no warning.
    config, stored = train.parse_arguments(["--resume", "--no-report", *quick[-1:]])
    console = Console(record=True, width=200)
    train.run(config, stored, console)
    assert "warning" not in console.export_text()


def test_bad_arguments_are_refused(tmp_path, run):
    with pytest.raises(UsageError, match="to hold a run"):
        visualize.main([str(tmp_path)])
    with pytest.raises(UsageError, match="images at least 1, got 0"):
        visualize.main([str(run), "--images=0"])


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("&")</script>'
    sections = [
        page.section(evil, page.text(evil), page.table((evil,), [(evil,)])),
        page.figure(b"<svg/>", evil) + page.key_numbers([(evil, evil)]),
    ]
    (tmp_path / "page.html").write_text(page.page(evil, page.text(evil), sections))
    found = Page(tmp_path / "page.html")
    assert "script" not in found.tags
    assert found.words.count(evil) == 10


def test_figures_are_reproducible_and_change_no_global_state():
    settings, known = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    series = {"a": ([1, 2], [3, 4])}
    image = figures.curves(series, "x", "y")
    assert image.startswith(b"<?xml")
    assert image == figures.curves(series, "x", "y")
    assert matplotlib.rcParams.copy() == settings
    assert ("matplotlib.pyplot" in sys.modules) == known


# ---- in a browser -------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(path: Path, screenshot: Path, height: int) -> list[str]:
    """Show a page in headless Chromium; return the lines of its console."""
    if CHROMIUM is None:
        if os.environ.get("FDDA_REQUIRE_CHROMIUM") == "1":
            pytest.fail("FDDA_REQUIRE_CHROMIUM=1, but chromium is not installed")
        pytest.skip("chromium is not installed")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--enable-logging=stderr --window-size=1000,{height}"
    )
    done = subprocess.run(
        [
            *(CHROMIUM, *flags.split(), f"--user-data-dir={screenshot.parent / 'profile'}"),
            *(f"--screenshot={screenshot}", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=1800,  # for a browser that hangs; a slow machine takes less
    )
    assert screenshot.exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_the_report_without_errors(run, tmp_path):
    screenshot = tmp_path / "report.png"
    assert not browse(run / "report.html", screenshot, 5000)
    with Image.open(screenshot) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3)
    ink = (pixels.int().sum(2) < 500).sum(1)  # by line
    # There are text and figures from top to bottom, and the colours of the curves.
    assert all(int(part.sum()) > 1000 for part in ink.split(1000))
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert int((pixels == torch.tensor(colour)).all(2).sum()) > 50, colour


def test_errors_in_the_console_of_the_browser_are_seen(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!DOCTYPE html><p>text</p><script>throw new Error('seen')</script>")
    assert any("seen" in line for line in browse(path, tmp_path / "page.png", 100))


# ---- measurements -------------------------------------------------------------------------------


def test_statistics_over_batches_equal_those_of_all_images():
    network, images = load_model("glyphs_resnet"), torch.randn(21, 3, 32, 32)
    seen = bn_statistics(network, images)
    x = network.conv1(images).double()
    assert torch.allclose(seen.means[0][0].double(), x.mean((0, 2, 3)), atol=1e-5)
    expected = x.var((0, 2, 3), unbiased=False)
    assert torch.allclose(seen.variances[0][0].double(), expected, rtol=1e-4)


def test_the_distance_of_statistics_is_in_standard_deviations():
    real = LayerStatistics([torch.zeros(1, 4)], [torch.full((1, 4), 9.0)])
    assert statistics_distance(real, real) == [0]
    moved = LayerStatistics([torch.full((1, 4), 6.0)], [torch.full((1, 4), 9.0)])
    assert statistics_distance(moved, real) == pytest.approx([2])
    wider = LayerStatistics([torch.zeros(1, 4)], [torch.full((1, 4), 36.0)])
    assert statistics_distance(wider, real) == pytest.approx([1])


def test_an_error_of_a_tenth_is_twenty_decibels():
    teacher, images = load_model("glyphs_mobilenet"), torch.randn(18, 3, 32, 32)
    assert layer_sqnr(teacher, trace(teacher, images), images) == {}
    louder = trace(teacher, images)
    last = [m for m in louder.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(1.1)
        last.bias.mul_(1.1)
    (ratio,) = layer_sqnr(teacher, louder, images).values()
    assert math.isclose(ratio, 20, abs_tol=1e-3)


def test_predictions_are_counted():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    seen = Predictions(labels, torch.tensor([0, 0, 0, 1, 2, 0]), torch.tensor([0, 1, 1, 1, 1, 0]))
    assert seen.agreement == pytest.approx(50)
    assert [seen.count(a, b) for a in (True, False) for b in (True, False)] == [2, 2, 1, 1]
    assert seen.losses(3) == [(0, 3, 3, 1)]
    assert seen.changes(3) == [(0, 1, 2), (2, 1, 1)]
    assert seen.confusion(3).tolist() == [[2, 2, 0], [0, 1, 0], [0, 1, 0]]


def test_the_report_shows_date_versions_and_machine(run):
    origin = json.loads((run / "origin.json").read_text())
    report = (run / "report.html").read_text()
    assert set(origin) == {"date", "versions", "machine"}
    assert all(value in report for value in origin.values())


def test_a_run_stopped_inside_a_unit_has_a_report(tmp_path):
    out = tmp_path / "run"
    arguments = ["--method=qdrop", "--baselines=[]", "--threads=1", "--test_limit=71"]
    train.main([*arguments, "--settings.qdrop.steps=1", f"--out={out}"])
    assert "not finished" not in (out / "report.html").read_text()
    units = json.loads((out / "units.json").read_text())
    for name in ("last", "decided", "divergence"):  # written after a unit's last step
        del units[-1][name]
    (out / "units.json").write_text(json.dumps(units))
    visualize.main([str(out)])
    assert "not finished" in (out / "report.html").read_text()


def test_correct_images_and_predicted_classes_are_counted():
    class Network(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)

    images = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 3] * 5), 4).view(20, 1, 2, 2)
    labels = torch.tensor([0, 1, 2, 3] * 5)
    assert judge(Network(), images.float(), labels) == (75, 3)


def test_both_networks_see_the_same_images():
    teacher = load_model("glyphs_resnet")
    source = BatchSource(load_dataset("glyphs", "test", limit=30), 8)
    seen = predict(teacher, teacher, source, torch.device("cpu"))
    assert seen.agreement == 100
    assert torch.equal(seen.labels, source.dataset.labels)
    assert seen.count(True, False) == seen.count(False, True) == 0
