"""Fake quantization: configuration, quantizers, ranges, and the preparation of a student.

``prepare`` (prepare.py) decides which tensor gets a grid, ``calibrate`` (student.py) where each
range ends, ``bits_table`` (report.py) shows the result. ``allocate_bits`` (allocation.py) chooses
the bits of every layer under a budget.
"""

from .allocation import allocate_bits
from .config import QuantizationConfig, parse_bits
from .prepare import prepare
from .report import LayerBits, bits_table, render_bits
from .student import (
    IMAGES_AT_ONCE,
    activation_quantizers,
    calibrate,
    project_scales_,
    scale_parameters,
    set_activation_mode,
)

__all__ = [
    "IMAGES_AT_ONCE",
    "LayerBits",
    "QuantizationConfig",
    "activation_quantizers",
    "allocate_bits",
    "bits_table",
    "calibrate",
    "parse_bits",
    "prepare",
    "project_scales_",
    "render_bits",
    "scale_parameters",
    "set_activation_mode",
]
