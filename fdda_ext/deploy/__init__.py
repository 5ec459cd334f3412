"""Lowering of a fake-quantized student to an integer program, and the program's file format."""

from .export import check_target, export_student
from .file import is_program, load_program, save_program, stored_bytes
from .graph import CapturedProgram, capture
from .instructions import CodeGrid, Value
from .lowering import export_obstacles, lower, refusal
from .program import IntegerProgram
from .student import load_student

__all__ = [
    "CapturedProgram",
    "CodeGrid",
    "IntegerProgram",
    "Value",
    "capture",
    "check_target",
    "export_obstacles",
    "export_student",
    "is_program",
    "load_program",
    "load_student",
    "lower",
    "refusal",
    "save_program",
    "stored_bytes",
]
