"""List the networks of torchvision, timm and pytorchcv that can be quantized, trained and exported.

    python python/networks.py --jobs 2                          all networks, two hours
    python python/networks.py --libraries torchvision --jobs 4
    python python/networks.py --libraries timm --per-family 1 --out /tmp/networks.md

The program runs convolutional classification networks with batch normalisation: all of torchvision,
those of timm that have trained weights, and the two smallest of each family of pytorchcv. Weights
are random, random images give BN statistics and ranges, and nothing is downloaded. The stages are

  prepared   The network is quantized to W4A4 on the deploy grid and calibrated.
  trained    One step of distillation has a finite loss and finite gradients.
  exported   The integer program is written to a file and read again.
  equal      Logits of that program and the student are bit-identical, for one and three images.

The page gives a reason for every failure. A network may take at most --memory and --minutes; a
process that hangs or dies is replaced. Results are stored beside the page, so that the same command
continues after an interruption. It repeats networks that ran out of time or memory. The exit status
is 1 if a network failed with an error other than a UsageError.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

import fdda_ext
from fdda_ext import deploy
from fdda_ext.commands.train import parse_arguments
from fdda_ext.data import Augmentation
from fdda_ext.deploy import load_program, lower, save_program
from fdda_ext.engine import run_command
from fdda_ext.engine.memory import is_out_of_memory
from fdda_ext.errors import UsageError
from fdda_ext.methods import Problem
from fdda_ext.methods.distillation import DistillationConfig, Student
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

LIBRARIES = ("torchvision", "timm", "pytorchcv")
#: Default of --per-family; None for all networks.
PER_FAMILY = {"torchvision": None, "timm": None, "pytorchcv": 2}
#: Number of images for BN statistics, ranges and the step.
IMAGES = 4
#: Batch sizes at which the logits of program and student are compared.
BATCHES = (1, 3)
#: Networks before a process is replaced, since some libraries do not free memory.
NETWORKS_PER_PROCESS = 25
#: Maximum number of characters of a reason.
LONGEST_REASON = 220
#: Names of attention modules, whose tensors are tokens, in the three libraries.
TOKENS = re.compile(
    r"^Attention|MultiHead|MultiQuery|SelfAttn|WindowAttention|Attention[24]d|BottleneckAttn"
)

LEFT_OUT = {
    "no batch normalisation": "without batch normalisation",
    "attention": "with layer normalisation or attention over tokens",
    "large": "with more than {most_parameters:g} million parameters",
    "no classifier": "that do not classify RGB images",
}


@dataclass(frozen=True)
class Candidate:
    """A network of a library.

    Attributes:
        name: Name that `load_model` takes.
        family: Module that defines the architecture.
        parameters: Number of parameters.
        image_size: First of the sizes tried that the network takes, in pixels.
        left_out: Key of `LEFT_OUT`, or empty if the network is to be run.
        error: Reason why the network cannot be built or run in float, or empty.
    """

    name: str
    family: str
    parameters: int = 0
    image_size: int = 0
    left_out: str = ""
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of every stage for a network; None for a stage that did not run.

    Attributes:
        name: Name that `load_model` takes.
        prepared: Whether the network was quantized and calibrated.
        trains: Whether the loss and the gradients of a step are finite.
        exported: Whether the program was written to a file and read.
        equal: Whether logits of that program and of the student are bit-identical.
        reason: Reason for a failure.
        crash: Whether the reason is an error other than a UsageError.
    """

    name: str
    prepared: bool | None = None
    trains: bool | None = None
    exported: bool | None = None
    equal: bool | None = None
    reason: str = ""
    crash: bool = False


# ---- in the worker processes --------------------------------------------------------------------


def families(library: str) -> dict[str, str]:
    """Return the family of every network of a library; for timm, only those with weights."""
    from fdda_ext._torchvision import import_torchvision

    models = import_torchvision().models
    if library == "torchvision":
        named = {name: models.get_model_builder(name) for name in models.list_models(models)}
        found = {name: build.__module__ for name, build in named.items()}
    elif library == "timm":
        import timm
        from timm.models import _registry

        names = dict.fromkeys(n.partition(".")[0] for n in timm.list_models(pretrained=True))
        found = {name: _registry._model_to_module[name] for name in names}
    else:
        from pytorchcv.model_provider import _models

        found = {name: build.__module__ for name, build in _models.items()}
    return {f"{library}:{name}": family.rpartition(".")[2] for name, family in found.items()}


def image_sizes(network: nn.Module, size: int) -> list[int]:
    """Return the image sizes to try: ``size`` first, then those that the network was made for."""
    configuration = getattr(network, "default_cfg", None) or {}
    own = configuration.get("input_size", (3, 224, 224))[-1]
    if configuration.get("fixed_input_size"):
        return [own]
    own = getattr(network, "in_size", (own, own))[-1]
    return list(dict.fromkeys([size, own, 224, 299]))


def inspect(candidate: Candidate, options: dict[str, Any]) -> Candidate:
    """Build a network, on the meta device if possible, and complete the candidate."""
    network = built = None
    try:
        with torch.device("meta"):
            network = load_model(candidate.name, weights=None)
    except Exception:  # some networks compute sizes from the values of tensors
        network = built = load_model(candidate.name, weights=None)
    parameters = sum(p.numel() for p in network.parameters())
    candidate = replace(candidate, parameters=parameters)
    modules = list(network.modules())
    if not any(isinstance(m, nn.Conv2d) for m in modules):
        return replace(candidate, left_out="no classifier")
    if any(isinstance(m, (nn.MultiheadAttention, nn.LayerNorm)) for m in modules) or any(
        TOKENS.search(type(m).__name__) for m in modules
    ):
        return replace(candidate, left_out="attention")
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        return replace(candidate, left_out="no batch normalisation")
    if parameters > options["most_parameters"] * 1e6:
        return replace(candidate, left_out="large")
    sizes = image_sizes(network, options["image_size"])
    try:
        size, output = smallest(network, sizes)
    except Exception as error:
        if built is not None or is_out_of_memory(error):
            raise
        size, output = smallest(load_model(candidate.name, weights=None), sizes)
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        return replace(candidate, left_out="no classifier")
    return replace(candidate, image_size=size)


def smallest(network: nn.Module, sizes: list[int]) -> tuple[int, object]:
    """Return the first image size that a network takes, and the network's output.

    Raises:
        Exception: The error of the network at the last size, if it takes no size.
    """
    device = next(network.parameters()).device
    for size in sizes:
        images = torch.zeros(2, 3, size, size, device=device)
        try:
            with torch.no_grad():
                network.train()(images)  # batch normalisation refuses feature maps of one value
                return size, network.eval()(images)
        except Exception as error:
            if size == sizes[-1] or is_out_of_memory(error):
                raise
    raise AssertionError("no sizes")


def words(error: BaseException) -> str:
    """Return the text of an error in one line."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return f"{name}{text}"[:LONGEST_REASON]


def settled(name: str, size: int) -> nn.Module:
    """Build a network with random weights and with the running statistics of random images.

    BN shifts of 1 let most values pass the ReLUs. Otherwise the output of a deep random network
    hardly depends on its input.
    """
    torch.manual_seed(0)
    network = load_model(name, weights=None).train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # plain mean over batches
            if module.affine:
                nn.init.ones_(module.weight)  # some libraries initialize this with zeros
                nn.init.ones_(module.bias)
    with torch.no_grad():
        network(torch.randn(IMAGES, 3, size, size))
    return network.eval().requires_grad_(False)


@cache
def distillation() -> DistillationConfig:
    """Return the settings of the distillation step."""
    return parse_arguments(["--method=distill"])[0].settings.distillation


def check(candidate: Candidate, say: Callable[[str], None]) -> Outcome:
    """Run a network through all stages, up to the first failure.

    Args:
        candidate: Network to run.
        say: Function that is called with the name of every step before the step begins.
    """
    outcome = Outcome(candidate.name)
    stage = "prepared"
    try:
        say("float network")
        network = settled(candidate.name, candidate.image_size)
        images = torch.randn(IMAGES, 3, candidate.image_size, candidate.image_size)
        with torch.no_grad():
            logits = network(images)
        if not logits.isfinite().all():
            return replace(outcome, reason="the float network's logits are not finite")
        say("preparation")
        quantization = QuantizationConfig(weight_bits=4, activation_bits=4)
        student = prepare(network, quantization, images[:2])
        calibrate(student, images)
        outcome = replace(outcome, prepared=True)

        stage = "trains"
        say("training")
        settings = distillation()
        labels = torch.arange(IMAGES) % logits.shape[1]
        classes = logits.shape[1]
        problem = Problem(network, classes, images, labels, Augmentation(), quantization, seed=0)
        loss = Student(student, problem, settings).step(images[:2], labels[:2])["student"]
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        finite = loss.isfinite() and all(bool(g.isfinite().all()) for g in gradients)
        outcome = replace(outcome, trains=bool(finite) and len(gradients) > 0)
        if not outcome.trains:
            return replace(outcome, reason="training: the loss or a gradient is not finite")

        stage = "exported"
        say("export")
        student.eval()
        find = getattr(deploy, "export_obstacles", None)
        obstacles: list[object] = [] if find is None else find(student)
        if obstacles:
            more = f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
            reason = f"{obstacles[0]}"[:LONGEST_REASON] + more
            return replace(outcome, exported=False, reason=reason)
        with tempfile.TemporaryDirectory() as folder:
            save_program(path := Path(folder) / "model.safetensors", lower(student))
            program = load_program(path)
            outcome = replace(outcome, exported=True)
            stage = "equal"
            say("comparison")
            with torch.no_grad():
                pairs = [(program(images[:n]), student(images[:n])) for n in BATCHES]
        equal = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        if not equal and not all(theirs.isfinite().all() for _, theirs in pairs):
            return replace(outcome, equal=False, reason="the student's logits are not finite")
        farthest = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        reason = "" if equal else f"crash: logits differ by {farthest:.3g}"
        return replace(outcome, equal=equal, reason=reason, crash=not equal)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        crash = not isinstance(error, UsageError)
        reason = f"crash: {words(error)}" if crash else words(error)
        failed: dict[str, Any] = {stage: False}
        return replace(outcome, reason=reason, crash=crash, **failed)


def serve(options: dict[str, Any]) -> None:
    """Answer questions from the standard input, one JSON object per line.

    A question asks for the names of a library, or to inspect or check a network. Lines
    ``{"stage": ...}`` may come before the answer. Other output goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit_memory(options["memory"])

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "library" in question:
                say({"families": families(question["library"])})
            elif "inspect" in question:
                candidate = Candidate(**question["inspect"])
                say({"stage": "construction"})
                try:
                    found = inspect(candidate, options)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    found = replace(candidate, error=f"construction: {words(error)}")
                say(asdict(found))
            else:
                outcome = check(Candidate(**question["check"]), lambda stage: say({"stage": stage}))
                say(asdict(outcome))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            say({"failed": f"needs more than {options['memory']:g} GiB of memory"})
            return


def limit_memory(gibibytes: float) -> None:
    """Limit the memory of this process, beyond what its libraries have mapped."""
    status = Path("/proc/self/status")
    if status.exists():
        (mapped,) = re.findall(r"^VmSize:\s*(\d+) kB", status.read_text(), re.M)
        most = int(mapped) * 1024 + int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


# ---- in the main process ------------------------------------------------------------------------


class Worker:
    """A process that answers questions; it is replaced when it dies, hangs or is old."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.served = 0
        # Standard error of the process.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.unread = b""

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer, or ``{"failed": reason}`` if there is none."""
        if self.process is None or self.served >= NETWORKS_PER_PROCESS:
            self.close()
            shared = {name: getattr(self.options, name) for name in SHARED}
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", json.dumps(shared)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
            )
            self.served, self.unread = 0, b""
        self.served += 1
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        stage = "start"
        deadline = time.monotonic() + 60 * self.options.minutes
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            while "stage" in (answer := self.next_answer(process, deadline)):
                stage = answer["stage"]
        except TimeoutError:
            self.close(kill=True)
            return {"failed": f"{stage}: takes more than {self.options.minutes:g} minutes"}
        except BrokenPipeError:
            status = process.wait()
            self.close(kill=True)
            complaint = self.complaint()
            if -status == signal.SIGKILL or "bad_alloc" in complaint:
                return {"failed": f"{stage}: needs more memory than is available"}
            last = complaint.strip().rpartition("\n")[2][:LONGEST_REASON]
            reason = f"crash: {stage}: the process ended with status {status} ({last})"
            return {"failed": reason, "crash": True}
        if "failed" in answer:
            self.close()
            answer["failed"] = f"{stage}: {answer['failed']}"
        return answer

    def next_answer(self, process: "subprocess.Popen[bytes]", deadline: float) -> dict[str, Any]:
        """Return the next line that the process writes.

        Raises:
            TimeoutError: If the process writes no line before the deadline.
            BrokenPipeError: If the process has ended.
        """
        assert process.stdout is not None
        while b"\n" not in self.unread:
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([process.stdout], [], [], left)[0]:
                raise TimeoutError
            if not (read := os.read(process.stdout.fileno(), 1 << 16)):
                raise BrokenPipeError
            self.unread += read
        line, _, self.unread = self.unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def complaint(self) -> str:
        """Return the last 4000 bytes that the process wrote to its standard error."""
        self.errors.seek(max(self.errors.seek(0, os.SEEK_END) - 4000, 0))
        return self.errors.read().decode(errors="replace")

    def close(self, *, kill: bool = False) -> None:
        """End the process."""
        if self.process is None:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.process = None


#: Options that are passed to the processes.
SHARED = ("image_size", "memory", "most_parameters")


class Workers:
    """A pool of `Worker` processes, to use as a context manager."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.all = [Worker(options) for _ in range(options.jobs)]
        self.free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.all:
            self.free.put(worker)
        self.pool = ThreadPoolExecutor(options.jobs)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:  # this ends the threads that wait for an answer
            if worker.process is not None:
                worker.process.kill()
        self.pool.shutdown(cancel_futures=True)
        for worker in self.all:
            worker.close(kill=True)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask a free worker."""
        worker = self.free.get()
        try:
            return worker.ask(question)
        finally:
            self.free.put(worker)

    def answers(self, questions: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the answers as they arrive, with the indices of their questions."""
        places = {self.pool.submit(self.ask, q): place for place, q in enumerate(questions)}
        for end in as_completed(places):
            yield places[end], end.result()


class Record:
    """A file of known results, one JSON object per line; results of other versions are ignored."""

    def __init__(self, path: Path, circumstances: dict[str, dict[str, Any]]) -> None:
        self.path = path
        #: Versions and options that affect the results, by kind of result.
        self.circumstances = circumstances
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    if entry["with"] == circumstances[entry["kind"]]:
                        self.found[entry["kind"], entry["value"]["name"]] = entry["value"]
                except (ValueError, KeyError, TypeError):  # an incomplete line
                    continue

    def add(self, kind: str, value: dict[str, Any]) -> None:
        """Store a result."""
        self.found[kind, value["name"]] = value
        with self.path.open("a") as file:
            entry = {"kind": kind, "value": value, "with": self.circumstances[kind]}
            file.write(json.dumps(entry) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of all packages that affect the results."""
    found = {"Python": platform.python_version()}
    for name in ("fdda_ext", "torch", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def digest_of_package() -> str:
    """Return a digest of all files of the package, so that results of other code are ignored."""
    digest = hashlib.sha256()
    root = Path(fdda_ext.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.glob("_C*.so")]):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def candidates(library: str, names: str, workers: Workers, record: Record) -> list[Candidate]:
    """Inspect all networks of a library whose names match a regular expression."""
    if ("names", library) not in record.found:
        answer = workers.ask({"library": library})
        if "failed" in answer:
            raise UsageError(f"networks: expected the names of {library}, got {answer['failed']}")
        record.add("names", {"name": library, **answer})
    families_of = record.found["names", library]["families"]
    named = {name: f for name, f in families_of.items() if re.search(names, name)}
    new = [name for name in named if ("candidate", name) not in record.found]
    questions = [{"inspect": asdict(Candidate(name, named[name]))} for name in new]
    for number, (place, found) in enumerate(workers.answers(questions), 1):
        name = new[place]
        if "failed" in found:  # out of time or memory; not stored, so that it is tried again
            found = asdict(Candidate(name, named[name], error=found["failed"]))
            record.found["candidate", name] = found
        else:
            record.add("candidate", found)
        about = found["left_out"] or found["error"] or f"{found['image_size']} pixels"
        print(f"[{number}/{len(new)}] {name}: {about}", flush=True)
    return [Candidate(**record.found["candidate", name]) for name in named]


def chosen(found: list[Candidate], per_family: int | None) -> list[Candidate]:
    """Return the candidates to run: all, or the smallest of each family."""
    fit = [c for c in found if not c.left_out]
    if per_family is None:
        return fit
    taken: Counter[str] = Counter()
    kept = set()
    for candidate in sorted(fit, key=lambda c: (bool(c.error), c.parameters)):
        if taken[candidate.family] < per_family:
            taken[candidate.family] += 1
            kept.add(candidate.name)
    return [c for c in fit if c.name in kept]


def outcomes(run: list[Candidate], workers: Workers, record: Record) -> list[Outcome]:
    """Check every network, or read its outcome from the record."""
    for candidate in run:
        if candidate.error:
            failed = Outcome(candidate.name, prepared=False, reason=candidate.error)
            record.found["outcome", candidate.name] = asdict(failed)
    new = [c for c in run if ("outcome", c.name) not in record.found]
    questions = [{"check": asdict(candidate)} for candidate in new]
    for number, (place, found) in enumerate(workers.answers(questions), 1):
        candidate = new[place]
        if "failed" in found:
            crash = found.get("crash", False)
            found = asdict(Outcome(candidate.name, reason=found["failed"], crash=crash))
            record.found["outcome", candidate.name] = found
        else:
            record.add("outcome", found)
        about = found["reason"] or "bit-identical"
        print(f"[{number}/{len(new)}] {candidate.name}: {about}", flush=True)
    return [Outcome(**record.found["outcome", candidate.name]) for candidate in run]


# ---- the page -----------------------------------------------------------------------------------

INTRODUCTION = """\
# Networks

This page shows which classification networks of three libraries work with this package. The program
`python/networks.py` makes it, in two hours on two cores: for all networks of torchvision, those of
timm that have trained weights, and the two smallest of each family of pytorchcv. Weights are
random, and BN statistics are those of random images. A network is prepared (W4A4, `deploy` grid,
calibrated on {images} random images), trained by one step of distillation, and exported to a file.
The column "equal" says whether the logits of that program are bit-identical to the student's, for
batches of {batches} images. Images have {size}x{size} pixels, or more if the network does not take
such small images.
"""
HEADER = ("network", "parameters, M", "pixels", "prepared", "trains", "exported", "equal", "reason")


def mark(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


#: Replacements for characters that are markup in a table cell.
PLAIN = str.maketrans({"|": "\\|", "<": "&lt;", "[": "&#91;", "`": "'"})


def section(
    library: str,
    found: list[Candidate],
    run: list[Candidate],
    ends: list[Outcome],
    most_parameters: float,
) -> str:
    """Return the section of a library: counts, table, and networks that are left out."""
    counts = {
        "are prepared": sum(e.prepared is True for e in ends),
        "train": sum(e.trains is True for e in ends),
        "are exported": sum(e.exported is True for e in ends),
        "are bit-identical": sum(e.equal is True for e in ends),
        "crash": sum(e.crash for e in ends),
    }
    lines = [f"## {library}", ""]
    lines += [f"Of {len(run)} networks, {', '.join(f'{n} {what}' for what, n in counts.items())}."]
    lines += ["", f"| {' | '.join(HEADER)} |", "|---|---:|---:|---|---|---|---|---|"]
    for candidate, end in zip(run, ends, strict=True):
        marks = (mark(x) for x in (end.prepared, end.trains, end.exported, end.equal))
        size = candidate.image_size or ""
        reason = end.reason.translate(PLAIN)
        cells = (candidate.name.partition(":")[2], f"{candidate.parameters / 1e6:.1f}", size)
        lines.append(f"| {' | '.join(map(str, (*cells, *marks, reason)))} |")
    for key, text in LEFT_OUT.items():
        names = [c.name.partition(":")[2] for c in found if c.left_out == key]
        if names:
            why = text.format(most_parameters=most_parameters)
            lines += ["", f"Left out are {len(names)} networks {why}: {', '.join(names)}."]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="separated by commas")
    parser.add_argument("--names", default="", help="regular expression for names of networks")
    parser.add_argument("--per-family", type=int, help="the N smallest of each family; 0: all")
    parser.add_argument("--image-size", type=int, default=96, help="in pixels, if possible")
    parser.add_argument("--most-parameters", type=float, default=120, help="in millions")
    parser.add_argument("--memory", type=float, default=8, help="limit for a network, in GiB")
    parser.add_argument("--minutes", type=float, default=20, help="time limit for a network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at once, one core each")
    parser.add_argument("--out", type=Path, default=Path("docs/networks.md"), help="page to write")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.libraries = options.libraries.split(",")
    for library in options.libraries:
        if library not in LIBRARIES:
            known = ", ".join(LIBRARIES)
            raise UsageError(f"networks: expected libraries among {known}, got {library}")
    for name in ("image_size", "most_parameters", "memory", "minutes", "jobs"):
        if not getattr(options, name) > 0:
            raise UsageError(f"networks: expected {name} above 0, got {getattr(options, name)}")
    if options.per_family is not None and options.per_family < 0:
        raise UsageError(f"networks: expected per_family at least 0, got {options.per_family}")
    try:
        re.compile(options.names)
    except re.error as error:
        raise UsageError(
            f"networks: expected names to be a regular expression, got {options.names} ({error})"
        ) from None
    return options


def main() -> None:
    options = parse()
    if options.serve:
        serve(json.loads(options.serve))
        return
    found_with = versions()
    shared = {name: getattr(options, name) for name in ("image_size", "most_parameters")}
    built = {**found_with, **shared}
    record = Record(
        options.out.with_suffix(".jsonl"),
        {
            "names": found_with,
            "candidate": built,
            "outcome": {**built, "package": digest_of_package()},
        },
    )
    introduction = INTRODUCTION.format(
        images=IMAGES, batches=" and ".join(map(str, BATCHES)), size=options.image_size
    )
    with_what = ", ".join(f"{name} {number}" for name, number in found_with.items())
    sections, crashes = [], []
    with Workers(options) as workers:
        for library in options.libraries:
            found = candidates(library, options.names, workers, record)
            limit = PER_FAMILY[library] if options.per_family is None else options.per_family
            run = chosen(found, limit or None)
            ends = outcomes(run, workers, record)
            sections.append(section(library, found, run, ends, options.most_parameters))
            crashes += [end for end in ends if end.crash]
    options.out.write_text("\n".join([introduction, f"With {with_what}.\n", *sections]))
    print("\n".join(text.splitlines()[2] for text in sections))
    print(f"written to {options.out}")
    if crashes:
        sys.exit(f"{len(crashes)} networks crash; the first is {crashes[0].name}")


if __name__ == "__main__":
    run_command(main)
