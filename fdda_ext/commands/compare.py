"""``python -m fdda_ext.compare``: compare methods at equal budgets.

Every cell is a run of `fdda_ext.train` in its own process and folder, so a comparison can be
stopped and continued at any time.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from ..data import ImageDataset, takes_preprocessing
from ..engine import (
    RunFolder,
    build_parser,
    format_duration,
    instantiate_or_refuse,
    parse_or_refuse,
    render_percent,
    standard_error,
    with_underscores,
)
from ..engine.checkpoint import atomic_write_text
from ..errors import UsageError
from ..methods import (
    METHODS,
    TRIAL_SHARE,
    Method,
    MethodSettings,
    Pace,
    Problem,
    build_on_few,
    measure_pace,
    method_class,
)
from ..quantization import QuantizationConfig, parse_bits
from ..visualization import comparison, some_images
from .train import (
    TrainConfig,
    build_problem,
    parse_arguments,
    preset_path,
    test_batches,
    without_unused,
)

__all__ = ["CompareConfig", "Setting", "main"]

_DESCRIPTION = """\
Run methods on the same networks, bits, calibration images and seeds. Write one table, CSV and plot.

examples:
  python -m fdda_ext.compare --methods fdda,gdfq,zaq --bits W4A4,W3A3 --budget 60
  python -m fdda_ext.compare --methods fdda,gdfq --mode common,published --jobs 2
  python -m fdda_ext.compare --methods gdfq,gdfq+bns_weight=0,gdfq+distillation.weight=20
  python -m fdda_ext.compare --methods fdda,brecq --preset paper -- --model torchvision:resnet18 \\
      --data imagenet:PATH --device cuda

Arguments after -- go to every run of fdda_ext.train. The same command continues a stopped
comparison.
"""

Mode = Literal["published", "common"]
_PUBLISHED: list[Mode] = ["published"]


@dataclass(frozen=True)
class CompareConfig:
    """What to compare.

    Attributes:
        methods: Methods as in fdda_ext.train --method. A variant adds settings:
            gdfq+bns_weight=0 sets settings.gdfq.bns_weight to 0, and a name with a dot includes the
            section (settings.NAME). A variant has the schedule share of its method.
        models: Networks as in fdda_ext.train --model.
        bits: Bits of weights and activations, such as W4A4.
        ends: Bits of the first and last layer; "same" for those of the other layers.
        images_per_class: Numbers of calibration images per class.
        seeds: Seeds for all random numbers, including the choice of calibration images.
        mode: "published" for each method's own student step; "common" for FDDA's in all methods, so
            that only the images differ.
        preset: Preset of all methods.
        budget: Training time of every run, in seconds. Trials, which take at most a tenth of it per
            method, determine the schedule shares. None leaves schedules unchanged.
        student_images: Number of images that every student sees in training, instead of budget.
        share: Schedule share of every run, instead of both.
        jobs: Number of runs at a time.
        threads: CPU threads of each run.
        out: Folder of all runs and results.
    """

    methods: list[str] = field(default_factory=lambda: ["minmax", "distill", "gdfq", "fdda"])
    models: list[str] = field(default_factory=lambda: ["glyphs_resnet"])
    bits: list[str] = field(default_factory=lambda: ["W4A4"])
    ends: list[int | Literal["same"]] = field(default_factory=lambda: ["same"])
    images_per_class: list[int] = field(default_factory=lambda: [1])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    mode: list[Mode] = field(default_factory=lambda: ["published"])
    preset: str = "short"
    budget: float | None = None
    student_images: int | None = None
    share: float | None = None
    jobs: int = 1
    threads: int = 1
    out: str = "runs/compare"

    def __post_init__(self) -> None:
        for name in ("methods", "models", "bits", "ends", "images_per_class", "seeds", "mode"):
            values = getattr(self, name)
            if not values:
                raise UsageError(f"compare: expected {name} to name at least one, got none")
            if len(set(values)) < len(values):
                raise UsageError(f"compare: expected {name} to differ, got {values}")
        for spec in self.methods:
            preset_path(self.preset, _method_of(spec))
            _constants_of(spec)
        for bits in self.bits:
            parse_bits(bits)
        for end in self.ends:
            if end != "same" and end not in range(2, 9):
                raise UsageError(f"compare: expected ends to be same or 2 to 8, got {end}")
        for name in ("budget", "student_images", "share", "jobs", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"compare: expected {name} above 0, got {value}")
        limits = [self.budget, self.student_images, self.share]
        if sum(limit is not None for limit in limits) > 1:
            raise UsageError(
                "compare: expected one of budget, student_images and share, "
                f"got {', '.join(str(limit) for limit in limits)}"
            )


@dataclass(frozen=True)
class Setting:
    """What all rows of one table have in common.

    Attributes:
        model: Network.
        bits: Bits, such as W4A4.
        ends: Bits of the first and last layer, or "same".
        images_per_class: Calibration images per class.
    """

    model: str
    bits: str
    ends: int | Literal["same"]
    images_per_class: int

    @property
    def name(self) -> str:
        """Name of the table's folder."""
        ends = "" if self.ends == "same" else f"ends{self.ends}"
        images = "" if self.images_per_class == 1 else f"{self.images_per_class}images"
        model = self.model.replace(":", "-").replace("/", "-")
        return "-".join(part for part in (model, self.bits, ends, images) if part)

    @property
    def title(self) -> str:
        """Title of the table."""
        ends = "first and last layer included"
        if self.ends != "same":
            ends = f"first and last layer at {self.ends} bits"
        plural = "s" if self.images_per_class > 1 else ""
        return f"{self.model}, {self.bits}, {ends}, {self.images_per_class} image{plural} per class"

    def arguments(self) -> list[str]:
        """Return the arguments for ``fdda_ext.train``."""
        ends = [] if self.ends == "same" else [f"--quantization.first_last_bits={self.ends}"]
        return [
            *(f"--model={self.model}", f"--bits={self.bits}"),
            *(f"--images_per_class={self.images_per_class}", *ends),
        ]


def _method_of(spec: str) -> str:
    """Return the method of a variant."""
    return spec.partition("+")[0]


def _constants_of(spec: str) -> list[str]:
    """Return the arguments that a variant adds for ``fdda_ext.train``."""
    method, *changes = spec.split("+")
    arguments = []
    for change in changes:
        name, equals, value = change.partition("=")
        if not (name and equals and value) or "/" in value:
            raise UsageError(
                f"compare: expected a variant of the form METHOD+NAME=VALUE, got {spec}"
            )
        section = "settings" if "." in name else f"settings.{method}"
        arguments.append(f"--{section}.{name}={value}")
    return arguments


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        setting: Table of the run.
        method: Method or variant.
        mode: Origin of the student step.
        seed: Seed for all random numbers.
    """

    setting: Setting
    method: str
    mode: Mode
    seed: int

    @property
    def row(self) -> str:
        """Name of the row."""
        return self.method if self.mode == "published" else f"{self.method} (common step)"

    @property
    def pace(self) -> str:
        """Key of the schedule share, without bits, seed and variant."""
        shared = replace(self, method=_method_of(self.method))
        return f"{replace(self.setting, bits='', ends='same').name}/{shared.row}"

    def folder(self, out: Path) -> Path:
        """Return the run folder."""
        mode = "" if self.mode == "published" else "-common"
        return out / self.setting.name / f"{self.method}{mode}-seed{self.seed}"


def parse(arguments: Sequence[str] | None = None) -> tuple[CompareConfig, list[str]]:
    """Return the configuration and the arguments for ``fdda_ext.train``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    here = given.index("--") if "--" in given else len(given)
    own, rest = with_underscores(given[:here]), given[here + 1 :]
    parser = build_parser("fdda_ext.compare", _DESCRIPTION)
    parser.add_class_arguments(CompareConfig, as_group=False)
    lists = {name for name, kind in CompareConfig.__annotations__.items() if "list" in kind}
    for index, argument in enumerate(own):
        name, equals, value = argument.partition("=")
        if name.removeprefix("--") not in lists:
            continue
        if equals:
            own[index] = f"{name}={_as_list(value)}"
        elif index + 1 < len(own):
            own[index + 1] = _as_list(own[index + 1])
    namespace = parse_or_refuse(parser, own)
    return CompareConfig(**instantiate_or_refuse(parser, namespace)), rest


def _as_list(text: str) -> str:
    return text if text.startswith("[") else f"[{text}]"


def settings_of(config: CompareConfig) -> list[Setting]:
    """Return the tables, in order."""
    return [
        Setting(*values)
        for values in itertools.product(
            config.models, config.bits, config.ends, config.images_per_class
        )
    ]


def cells_of(config: CompareConfig, setting: Setting) -> Iterator[Cell]:
    """Yield the runs of one table. Methods with FDDA's or no student step have one mode."""
    for method in config.methods:
        kind = METHODS[_method_of(method)]
        modes = config.mode if kind.distils and kind.presets != "fdda" else _PUBLISHED
        for mode, seed in itertools.product(modes, config.seeds):
            yield Cell(setting, method, mode, seed)


def run_arguments(config: CompareConfig, cell: Cell, rest: Sequence[str]) -> list[str]:
    """Return the arguments for ``fdda_ext.train``, except ``--out`` and ``--schedule_share``."""
    common = []
    if cell.mode == "common":
        preset = yaml.safe_load(preset_path(config.preset, "fdda").read_text())
        step = preset["settings"]["distillation"]
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in step.items()}
        common = [f"--settings.distillation.{name}={text}" for name, text in texts.items()]
    own = [f"--method={_method_of(cell.method)}", f"--preset={config.preset}", "--baselines=[]"]
    # Common arguments may concern only some methods. Those of a variant must be used.
    shared = [f"--seed={cell.seed}", f"--threads={config.threads}", *cell.setting.arguments()]
    used = without_unused([*own, *shared, *common, *rest])
    return [*used, *_constants_of(cell.method)]


# ---- equal budgets ------------------------------------------------------------------------------

#: Smallest and largest schedule share.
_SHARES = (1 / 64, 64.0)


#: The problem that was prepared last, by its configuration without the method.
_prepared: dict[str, Problem] = {}


def _shared_problem(config: TrainConfig) -> Problem:
    """Return the problem of ``config``, prepared once for all methods."""
    shared = replace(config, method="minmax", baselines=[], settings=MethodSettings())
    key = repr(replace(shared, quantization=QuantizationConfig()))
    if key not in _prepared:
        _prepared.clear()  # one network at a time in memory
        _prepared[key] = build_problem(config)[0]
    return replace(_prepared[key], quantization=config.quantization)


def trial(config: TrainConfig, most: float) -> Pace:
    """Measure the pace of the method in ``config``. See `measure_pace`.

    On a CPU with one thread, the clock counts processor time, which excludes waiting.

    Args:
        config: Configuration of the run.
        most: Time limit of all trials together, in seconds.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    problem = _shared_problem(config)
    on_cpu = problem.device.type == "cpu" and config.threads == 1

    def now() -> float:
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        return time.process_time() if on_cpu else time.perf_counter()

    def build(settings: MethodSettings, images: int) -> Method:
        return build_on_few(config.method, problem, settings, images)

    return measure_pace(build, config.settings, len(problem.images), most, now)


def _timed(arguments: list[str], most: float) -> Pace:
    return trial(parse_arguments(arguments)[0], most)


def schedule_share(config: CompareConfig, cell: Cell, rest: Sequence[str]) -> float:
    """Return the schedule share of a run without a time budget."""
    if config.student_images is None:
        return config.share or 1.0
    run, _ = parse_arguments(run_arguments(config, cell, rest))
    step = run.settings.distillation
    seen = step.steps * (step.real_batch + step.generated_batch)
    has_step = METHODS[run.method].distils and seen
    return config.student_images / seen if has_step else 1.0


def share_in_budget(pace: Pace, budget: float, method: str) -> float:
    """Return the schedule share that takes ``budget`` seconds.

    Raises:
        UsageError: If the budget ends before the first iteration.
    """
    if pace.iterations == 0:  # nothing to train
        return 1.0
    if pace.fixed >= budget:
        raise UsageError(
            f"compare: expected budget to exceed the {format_duration(pace.fixed)} that {method} "
            f"needs before training, got {budget:g} s"
        )
    least, most = _SHARES
    return max(pace.share_in(budget, most), least)


def all_shares(config: CompareConfig, rest: Sequence[str], console: Console) -> dict[str, float]:
    """Return the schedule share of every pace. The folder stores them for later calls.

    Raises:
        UsageError: If the folder's runs were made with another budget, preset or arguments.
    """
    path = Path(config.out) / "budget.json"
    fixed = {
        "budget": config.budget,
        "student_images": config.student_images,
        "share": config.share,
        "preset": config.preset,
        "threads": config.threads,
        "arguments": list(rest),
    }
    stored: dict[str, Any] = {"fixed": fixed, "shares": {}}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["fixed"] != fixed:
            changed = next(k for k in fixed if stored["fixed"].get(k) != fixed[k])
            raise UsageError(
                f"compare: expected {changed} as in the runs that {config.out} holds, "
                f"{stored['fixed'].get(changed)}, got {fixed[changed]}; give another --out"
            )
    shares: dict[str, float] = stored["shares"]

    def keep(pace: str, share: float) -> None:
        shares[pace] = share
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(stored, indent=2) + "\n")

    missing: dict[str, Cell] = {}
    for setting in settings_of(config):
        for cell in cells_of(config, setting):
            if cell.pace not in shares:
                missing.setdefault(cell.pace, replace(cell, method=_method_of(cell.method)))
    if config.budget is None:
        for pace, cell in missing.items():
            keep(pace, schedule_share(config, cell, rest))
        return shares
    for pace, found in _measured(config, missing, rest, console):
        keep(pace, share_in_budget(found, config.budget, missing[pace].method))
        console.print(
            f"{pace}: {format_duration(found.fixed + found.whole)} for the whole schedule, "
            f"estimated from {found.iterations} iterations; runs get {shares[pace]:g} of it",
            highlight=False,
        )
    return shares


def _measured(
    config: CompareConfig, cells: dict[str, Cell], rest: Sequence[str], console: Console
) -> Iterator[tuple[str, Pace]]:
    """Measure the paces of ``cells`` by trials, ``config.jobs`` at a time."""
    if not cells:
        return
    assert config.budget is not None
    most = TRIAL_SHARE * config.budget
    rounds = -(-len(cells) // config.jobs)
    console.print(
        f"trials of {len(cells)} schedules: at most {format_duration(most)} each, "
        f"{format_duration(most * rounds)} in all, plus the time to load networks",
        highlight=False,
    )
    arguments = {pace: run_arguments(config, cell, rest) for pace, cell in cells.items()}
    if config.jobs == 1:
        for pace, given in arguments.items():
            yield pace, _timed(given, most)
        return
    # Not threads, because they would share torch's number of CPU threads.
    with ProcessPoolExecutor(config.jobs, get_context("spawn")) as pool:
        ends = {pool.submit(_timed, given, most): pace for pace, given in arguments.items()}
        try:
            for end in as_completed(ends):
                yield ends[end], end.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---- the runs -----------------------------------------------------------------------------------


def run_cell(config: CompareConfig, cell: Cell, share: float, rest: Sequence[str]) -> str | None:
    """Start or continue a run. Its output goes to a file beside its folder.

    Returns:
        The error message, or None.
    """
    folder = cell.folder(Path(config.out))
    if RunFolder.is_finished(folder):
        return None
    arguments = run_arguments(config, cell, rest)
    if METHODS[_method_of(cell.method)].trains:
        arguments.append(f"--schedule_share={share}")
    if (folder / "config.yaml").exists():
        arguments = [f"--threads={config.threads}", "--resume", "--no_report"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "fdda_ext.train", *arguments, "--no-report", f"--out={folder}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    if done.returncode == 0 and RunFolder.is_finished(folder):
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def summary_of(cell: Cell, out: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None."""
    path = cell.folder(out) / "summary.json"
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


@dataclass(frozen=True)
class Result:
    """A row of a table.

    Attributes:
        row: Method and mode.
        top1: Accuracy of every finished seed, in per cent.
        float_top1: Accuracy of the float network, in per cent.
        seconds: Mean training time.
        real_images: Number of real images.
        synthetic_images: Mean number of synthetic images.
        peak_memory: Largest peak memory, in MiB.
        share: Schedule share.
        images: Number of tested images.
        of: Number of images that these are a sample of; 0 if they are no sample.
    """

    row: str
    top1: list[float]
    float_top1: float
    seconds: float
    real_images: int
    synthetic_images: float
    peak_memory: int
    share: float
    images: int
    of: int = 0

    @property
    def mean(self) -> float:
        """Mean of `top1`."""
        return statistics.mean(self.top1)

    @property
    def spread(self) -> float:
        """Standard deviation of `top1`; 0 for one seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0


def results_of(config: CompareConfig, setting: Setting, shares: dict[str, float]) -> list[Result]:
    """Return the rows of one table that have a finished run."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell in cells_of(config, setting):
        if (found := summary_of(cell, Path(config.out))) is not None:
            rows.setdefault(cell.row, []).append({**found, "share": shares[cell.pace]})
    return [
        Result(
            row,
            [s["top1"] for s in found],
            found[0]["float_top1"],
            statistics.mean(s["seconds"] for s in found),
            found[0]["real_images"],
            statistics.mean(s["synthetic_images"] for s in found),
            max(s["peak_memory"] for s in found),
            found[0]["share"],
            found[0]["images"],
            found[0].get("of", 0),
        )
        for row, found in rows.items()
    ]


def render(setting: Setting, results: Sequence[Result]) -> str:
    """Return one table in Markdown. The best mean is bold."""
    best = max(result.mean for result in results)
    first = results[0]
    note = f"Float network: {render_percent(first.float_top1, first.images, first.of)} % top-1."
    if first.images < first.of:
        error = max(standard_error(result.mean, first.images, first.of) for result in results)
        note += (
            f" Tested on {first.images} of {first.of} images: one accuracy has a standard error of "
            f"at most {error:.2f} points. All rows use the same images, so differences between "
            "rows have a smaller error. In the table, ± is the standard deviation over the seeds."
        )
    lines = [
        f"### {setting.title}",
        "",
        note,
        "",
        "| method | top-1 % | drop | training "
        "| real images | synthetic images | peak MiB | schedule |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        top1 = f"{r.mean:.2f} ± {r.spread:.2f}"
        lines.append(
            f"| {r.row} | {f'**{top1}**' if r.mean == best else top1} "
            f"| {r.float_top1 - r.mean:.2f} | {format_duration(r.seconds)} | {r.real_images} "
            f"| {r.synthetic_images:.0f} | {r.peak_memory} | {r.share:.3g} |"
        )
    return "\n".join(lines) + "\n"


#: Number of real images for statistics, and of images to show per method.
_REAL_IMAGES, _SHOWN_IMAGES = 512, 16


def write_results(config: CompareConfig, shares: dict[str, float]) -> str:
    """Write ``comparison.md``, ``comparison.csv`` and ``comparison.png``. Return the Markdown."""
    out = Path(config.out)
    tables = [(s, found) for s in settings_of(config) if (found := results_of(config, s, shares))]
    text = "\n".join(render(setting, results) for setting, results in tables)
    atomic_write_text(out / "comparison.md", text)
    lines: list[dict[str, Any]] = []
    for setting in settings_of(config):
        for cell in cells_of(config, setting):
            if (summary := summary_of(cell, out)) is None:
                continue
            summary.pop("config")
            line = {**asdict(setting), "mode": cell.mode, "seed": cell.seed, **summary}
            lines.append({**line, "schedule_share": shares[cell.pace]})
    # Runs of older versions lack columns.
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with (out / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if lines:
            writer.writeheader()
        writer.writerows(lines)
    if tables:
        panels = {
            setting.title.replace(", first", ",\nfirst"): (
                results[0].float_top1,
                {result.row: result.top1 for result in results},
            )
            for setting, results in tables
        }
        (out / "comparison.png").write_bytes(comparison.accuracies(panels))
    return text


def write_images(config: CompareConfig, rest: Sequence[str]) -> None:
    """Write ``NAME-images.png`` and ``NAME-distances.png``, on the images of the first seed.

    One pair serves all bits, because the images hardly depend on them.
    """
    out = Path(config.out)
    shown: dict[str, dict[str, Cell]] = {}
    for setting in settings_of(config):
        for cell in cells_of(config, setting):
            if (cell.folder(out) / "images.safetensors").exists() and cell.method in METHODS:
                name, _, row = cell.pace.partition("/")
                shown.setdefault(name, {}).setdefault(row, cell)
    for name, cells in shown.items():
        run, _ = parse_arguments(run_arguments(config, next(iter(cells.values())), rest))
        problem, opened = build_problem(run)
        preprocessing = opened.preprocessing if takes_preprocessing(run.data) else None
        batches = test_batches(run, preprocessing, _REAL_IMAGES, problem.channels)
        dataset = cast(ImageDataset, batches.dataset)
        real = some_images(batches, _REAL_IMAGES, problem.device)
        made = {
            row: load_file(str(cell.folder(out) / "images.safetensors"))["images"].to(real)
            for row, cell in cells.items()
        }
        mean, std = (real.new_tensor(x).view(-1, 1, 1) for x in (dataset.mean, dataset.std))
        pictures = {
            row: (images[:_SHOWN_IMAGES] * std + mean).clamp(0, 1)
            for row, images in {"real": real, **made}.items()
        }
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)).to(real)
        compared = {"noise": noise, "calibration images": problem.images, **made}
        (out / f"{name}-images.png").write_bytes(comparison.image_rows(pictures))
        (out / f"{name}-distances.png").write_bytes(
            comparison.distances(problem.teacher, compared, real, name)
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config, rest = parse(arguments)
    setting = settings_of(config)[0]
    for number, spec in enumerate(config.methods):
        method_class(_method_of(spec))
        if number == 0 or spec not in METHODS:  # check common arguments, and those of variants
            cell = Cell(setting, spec, "published", config.seeds[0])
            parse_arguments(run_arguments(config, cell, rest))
    console = Console()
    shares = all_shares(config, rest, console)
    cells = [cell for setting in settings_of(config) for cell in cells_of(config, setting)]
    failures = []
    pool = ThreadPoolExecutor(config.jobs)
    try:
        ends = [pool.submit(run_cell, config, cell, shares[cell.pace], rest) for cell in cells]
        for number, (cell, end) in enumerate(zip(cells, ends, strict=True), 1):
            failure = end.result()
            name = f"[{number}/{len(cells)}] {cell.setting.name}, {cell.row}, seed {cell.seed}"
            found = summary_of(cell, Path(config.out))
            if failure is None and found is not None:
                top1 = render_percent(found["top1"], found["images"], found.get("of", 0))
                console.print(f"{name}: {top1} %", highlight=False, markup=False)
            else:
                failures.append(f"{name}: {failure}")
                console.print(failures[-1], highlight=False, markup=False)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, which the runs also receive
    write_images(config, rest)
    console.print(write_results(config, shares), highlight=False, markup=False, soft_wrap=True)
    if failures:
        raise UsageError(
            f"compare: expected every run to finish, got {len(failures)} that did not; the first "
            f"is {failures[0]}"
        )
