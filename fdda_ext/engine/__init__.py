"""The parts of a run that all methods share: folder, checkpoints, training loop, evaluation."""

from .checkpoint import cpu_state, digest, load_state, restore_random, save_state
from .cli import (
    build_parser,
    check_machine,
    decode_workers,
    instantiate_or_refuse,
    parse_or_refuse,
    run_command,
    with_underscores,
)
from .diagnosis import diagnose, doubt_margin
from .duration import Stopwatch, format_duration, format_significant
from .evaluation import (
    Accuracy,
    BatchSource,
    count_correct,
    evaluate,
    render_percent,
    standard_error,
)
from .loop import Progress, Trainable, train
from .memory import (
    LiveTensors,
    free_memory,
    keep_freed_memory,
    large_blocks_returned,
    must_fit,
    parts_of,
    peak_memory,
    process_memory,
    release_freed_memory,
)
from .probe import check_logits, count_outputs, input_channels
from .profiling import Profile, profile, stage
from .progress import ProgressBar, progress_bar
from .replay import Replayed
from .run_folder import RunFolder
from .student_file import image_shape_of, preprocessing_of, read_student, write_student

__all__ = [
    "Accuracy",
    "BatchSource",
    "LiveTensors",
    "Profile",
    "Progress",
    "ProgressBar",
    "Replayed",
    "RunFolder",
    "Stopwatch",
    "Trainable",
    "build_parser",
    "check_logits",
    "check_machine",
    "count_correct",
    "count_outputs",
    "cpu_state",
    "decode_workers",
    "diagnose",
    "digest",
    "doubt_margin",
    "evaluate",
    "format_duration",
    "format_significant",
    "free_memory",
    "image_shape_of",
    "input_channels",
    "instantiate_or_refuse",
    "keep_freed_memory",
    "large_blocks_returned",
    "load_state",
    "must_fit",
    "parse_or_refuse",
    "parts_of",
    "peak_memory",
    "preprocessing_of",
    "process_memory",
    "profile",
    "progress_bar",
    "read_student",
    "release_freed_memory",
    "render_percent",
    "restore_random",
    "run_command",
    "save_state",
    "stage",
    "standard_error",
    "train",
    "with_underscores",
    "write_student",
]
