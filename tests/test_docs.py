"""The documentation: code blocks, commands, links, and names that the text uses."""

import contextlib
import doctest
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

from fdda_ext.commands import compare, train
from fdda_ext.data import glyphs
from fdda_ext.errors import UsageError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("python", "console", "yaml")
NOT_CODE = ("text", "math", "mermaid")

#: Options appended to commands so that a page takes seconds; the last value of an option counts.
CHEAP = {
    "train": [
        *("--schedule-share=0.005", "--threads=1", "--no-report"),
        *(f"--settings.distillation.{part}_batch=4" for part in ("real", "generated")),
        *("--settings.fdda.batch=4", "--settings.fdda.generator.channels=4"),
        *("--quantization.weight_range=minmax", "--quantization.activation_range=minmax"),
    ],
    # FDDA needs images that the float network classifies correctly, so let it overfit.
    "pretrain": ["--epochs=10", "--images=128", "--threads=1"],
    "visualize": ["--images=16"],
}
#: Images per class of the reduced embedded data, for the same reason.
IMAGES_PER_CLASS = {"train": 16, "test": 1}
#: Commands that cannot run here, with what is missing and the error of the command. The error is
#: None for commands that only take too long.
NOT_RUN = {
    "python -m fdda_ext.train --config imagenet/resnet18-w4a4-f4l4 --data imagenet:PATH": (
        "ImageNet",
        "expected the path to be a folder, got PATH",
    ),
    "python -m fdda_ext.train --model timm:resnet50 --weights default --data folder:PATH "
    "--bits W4A4 --out runs/b": (
        "images and weights",
        "expected the path to be a folder, got PATH",
    ),
    "torchrun --nproc-per-node 8 -m fdda_ext.train --device cuda "
    "--config imagenet/resnet18-w4a4-f4l4 --data imagenet:PATH": (
        "eight GPUs",
        "expected device to be available, got cuda",
    ),
    "python -m fdda_ext.compare --methods fdda,gdfq,zaq --bits W4A4,W3A3 --budget 60": (
        "half an hour",
        None,
    ),
    "python -m fdda_ext.compare --methods noise,minmax,mse,distill,di,adi,zeroq,dsg,gdfq,qimera,"
    "zaq,fdda --models glyphs_resnet,glyphs_mobilenet --bits W3A3,W4A4 --budget 45 --jobs 2 "
    "--out runs/comparison -- --test-limit 2130 --test-batch 50": ("an hour", None),
    "python -m fdda_ext.compare --methods minmax,mse,lapq,bitsplit,adaquant,brecq,qdrop,distill,"
    "fdda --models glyphs_resnet,glyphs_mobilenet --bits W2A4,W3A3,W4A4 --budget 45 --jobs 2 "
    "--out runs/comparison -- --test-limit 2130 --test-batch 50": ("more than an hour", None),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page that begins in line ``line``."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """Name of the file that the reader is to write, or None."""
        first = re.match(r"# ([\w-]+\.\w+)\n", self.text)
        return first[1] if first else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = re.findall(r"^.*(?:```|~~~).*$", text, re.M)
    found = [
        Block(m[1], m[2], text.count("\n", 0, m.start()) + 2)
        for m in re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", text, re.M)
    ]
    assert len(fences) == 2 * len(found), "a fence is indented or not closed"
    return found


def prose(page: Path) -> str:
    return re.sub(r"^```(?:.*\n)*?```$", "", page.read_text(), flags=re.M)


def commands(block: Block) -> list[list[str]]:
    """Return the words of every command of a console block, which must hold only commands."""
    lines = block.text.replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines), "output belongs in a separate block"
    return [shlex.split(line[2:], comments=True) for line in lines]


def by_name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_has_a_known_language(page):
    assert {block.language for block in blocks(page)} <= {*CODE, *NOT_CODE}


def test_commands_that_are_not_run_are_on_a_page():
    written = {
        " ".join(words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "console"
        for words in commands(block)
    }
    assert NOT_RUN.keys() <= written


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty working folder, and little embedded data; everything is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Keep calls of `fdda_ext.quantize` short on every machine.
    monkeypatch.setattr("fdda_ext.quantizing.fitting_share", lambda *_, **__: 1 / 200)
    for split, count in IMAGES_PER_CLASS.items():
        monkeypatch.setitem(glyphs._LENGTHS, split, count * len(glyphs.CHARACTERS))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language in CODE for b in blocks(p))], ids=by_name
)
def test_all_code_of_a_page_works(page, reader):
    namespace: dict[str, Any] = {"__name__": "__main__"}
    files: set[str] = set()
    used: set[str] = set()
    for block in blocks(page):
        if block.language == "console":
            for words in commands(block):
                run(words)
                used |= {f for f in files if re.search(rf"\b{Path(f).stem}\b", " ".join(words))}
        elif block.language in CODE and block.file:
            (reader / block.file).write_text(block.text)
            files.add(block.file)
        elif block.language == "python" and block.text.startswith(">>> "):
            run_session(block.text, namespace)
        elif block.language == "python":
            place = "\n" * (block.line - 1)  # tracebacks name the page's lines
            exec(compile(place + block.text, str(page), "exec"), namespace)
        else:
            assert block.language in NOT_CODE, f"line {block.line}: the name of the file is missing"
    assert used == files, "no command uses one of the files"


def run_session(text: str, namespace: dict[str, Any]) -> None:
    """Run the code after ``>>>``, and compare results that the page shows."""
    for example in doctest.DocTestParser().get_examples(text):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(example.source, "<session>", "single"), namespace)
        assert not example.want or shown.getvalue() == example.want


def run(words: list[str]) -> None:
    """Run a command of a page in this process, or check it as far as possible."""
    lacking, error = NOT_RUN.get(" ".join(words), ("", None))
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        return
    if words[0] == "pip":
        assert words[1] == "install"
        if words[-1] == ".":  # the others need a network connection
            dry = [sys.executable, "-m", *words, "--dry-run", "--no-deps"]
            subprocess.run(dry, cwd=ROOT, check=True, capture_output=True)
        return
    if words[0] == "torchrun":
        launched = torchrun_parser().parse_args(words[1:])
        assert launched.module
        words = ["python", "-m", launched.training_script, *launched.training_script_args]
    assert words[0] == "python", f"an unknown command: {words}"
    if words[1] != "-m":
        with mock.patch.object(sys, "argv", words[1:]):
            runpy.run_path(words[1], run_name="__main__")
        return
    main = importlib.import_module(words[2]).main
    if error is not None:
        no_gpu = mock.patch.object(torch.cuda, "device_count", return_value=0)
        with no_gpu, pytest.raises(UsageError, match=error):
            main(words[3:])
    elif lacking:
        check_runs_of_comparison(words[3:])
    else:
        command = words[2].removeprefix("fdda_ext.")
        arguments = [*words[3:], *CHEAP.get(command, [])]
        resumed = "--resume" in arguments
        main(train.without_unused(arguments) if command == "train" and not resumed else arguments)


def check_runs_of_comparison(arguments: list[str]) -> None:
    """Check that fdda_ext.train accepts the arguments of all runs of fdda_ext.compare."""
    config, rest = compare.parse(arguments)
    first, *others = compare.settings_of(config)
    cells = [cell for cell in compare.cells_of(config, first) if cell.seed == config.seeds[0]]
    for cell in [*cells, *(next(compare.cells_of(config, setting)) for setting in others)]:
        train.parse_arguments(["--out=x", *compare.run_arguments(config, cell, rest)])


# ---- links and names ------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links(page: Path) -> list[tuple[str, str]]:
    """Return text and target of every link within the repository."""
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page))
    return [(text, target) for text, target in found if not re.match(r"\w+:", target)]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files_and_headings(page):
    for _, target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_files_and_commands_that_the_text_names_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for span in re.findall(r"`([^`]+)`", prose(page)):
        span = " ".join(span.split())
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|cpp|h|cuh|cu)", span):
            assert any((ROOT / place / span).exists() for place in ("", "fdda_ext")), span
        if command := re.match(r"make (\w+)", span):
            assert command[1] in targets, span
        if command := re.match(r"python (?:-m ([\w.]+)|(\S+\.py))", span):
            module, path = command.groups()
            assert callable(importlib.import_module(module).main) if module else path
            assert module or (ROOT / path).exists() or path in files_of(page), span


COMMANDS = ("train", "evaluate", "export", "pretrain", "compare", "visualize", "data.synthetic")
#: Options of other programs that the pages name.
FOREIGN = {"--nproc-per-node", "--nnodes", "--no-build-isolation", "--fmad", "--no-deps", "--help"}


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every command and program, with underscores; "" has all of them."""
    found: dict[str, set[str]] = {}
    for name in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
            importlib.import_module(f"fdda_ext.{name}").main(["--help"])
        found[f"fdda_ext.{name}"] = set(re.findall(r"--[\w.-]+", help_text.getvalue()))
    for program in [*(ROOT / "python").glob("*.py"), ROOT / "benchmarks" / "gpu_report.py"]:
        text = program.read_text()
        if "import cost_table" in text:  # this function parses the options
            text += (ROOT / "python" / "common.py").read_text()
        found[program.name] = set(re.findall(r"\"(--[\w-]+)\"", text))
    found = {name: {o.replace("-", "_") for o in every} for name, every in found.items()}
    return {**found, "": set.union(*found.values()) | {o.replace("-", "_") for o in FOREIGN}}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_options_that_the_text_names_exist(page, options):
    for span in re.findall(r"`([^`]*--\w[^`]*)`", prose(page)):
        command = re.match(r"(?:python )?(?:-m )?(fdda_ext\.\w+(?:\.\w+)?|\S+\.py) ", span)
        name = Path(command[1]).name if command else ""
        known = options[name if name in options else ""]
        for option in re.findall(r"(?<!\S)--[\w.-]*\w", span):
            wanted = re.sub(r"[A-Z]{2,}", r"\\w+", re.escape(option.replace("-", "_")))
            # The name of a section matches all of its options; --no_ matches a negated option.
            wanted = wanted.replace("__no_", "__(no_)?")
            assert any(re.match(rf"{wanted}\b", o) for o in known), (span, option)


def files_of(page: Path) -> set[str | None]:
    return {block.file for block in blocks(page)}


def members(owner: Any) -> set[str]:
    return {*dir(owner), *getattr(owner, "__annotations__", {})}


def test_the_method_page_names_existing_objects():
    page = ROOT / "docs" / "method.md"
    named = [(text, target) for text, target in links(page) if target.endswith(".py")]
    assert len(named) > 50
    for text, target in named:
        module = target.removeprefix("../").removesuffix(".py").replace("/", ".")
        assert re.fullmatch(r"`[\w.]+`", text), text
        owner: Any = importlib.import_module(module)
        for name in text.strip("`").split("."):
            assert name in members(owner), f"{text} in {target}"
            owner = getattr(owner, name, None)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        values |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return values


def test_the_method_page_lists_every_difference_between_the_presets():
    paper, short = (
        flat(yaml.safe_load((ROOT / f"fdda_ext/presets/fdda/{name}.yaml").read_text()))
        for name in ("paper", "short")
    )
    rows = re.findall(
        r"^\| `((?:settings|quantization)\.[\w.]+)` \|(.*?)\|(.*?)\|(.*?)\|$",
        (ROOT / "docs" / "method.md").read_text(),
        re.M,
    )
    listed = {name: (yaml.safe_load(a), yaml.safe_load(b)) for name, a, b, _ in rows}
    assert listed == {
        name: (paper.get(name), short.get(name))
        for name in paper | short
        if paper.get(name) != short.get(name)
    }
    assert all(reason.strip() for *_, reason in rows)
