"""What a run needs whatever its method: a folder, checkpoints, a loop, an evaluation."""

from .checkpoint import cpu_state, digest, load_state, save_state
from .cli import build_parser, check_machine, parse_or_refuse, run_command
from .evaluation import Accuracy, BatchSource, count_outputs, evaluate
from .loop import Progress, Trainable, train
from .run_folder import RunFolder
from .student_file import read_student, write_student

__all__ = [
    "Accuracy",
    "BatchSource",
    "Progress",
    "RunFolder",
    "Trainable",
    "build_parser",
    "check_machine",
    "count_outputs",
    "cpu_state",
    "digest",
    "evaluate",
    "load_state",
    "parse_or_refuse",
    "read_student",
    "run_command",
    "save_state",
    "train",
    "write_student",
]
