"""Fake quantization: configuration, quantizers, ranges, and preparation of a student.

``prepare`` (prepare.py) chooses the tensors to quantize, ``calibrate`` (student.py) sets their
ranges, and ``bits_table`` (report.py) lists the result. ``allocate_bits`` (allocation.py) chooses
the bits of every layer for a given average.
"""

from .allocation import allocate_bits
from .bias_correction import correct_biases_
from .config import QuantizationConfig, parse_bits
from .prepare import prepare
from .report import LayerBits, bits_table, render_bits
from .student import (
    IMAGES_AT_ONCE,
    activation_quantizers,
    calibrate,
    float_copy,
    project_scales_,
    scale_parameters,
    set_activation_mode,
)
from .tracing import any_memory_format

__all__ = [
    "IMAGES_AT_ONCE",
    "LayerBits",
    "QuantizationConfig",
    "activation_quantizers",
    "allocate_bits",
    "any_memory_format",
    "bits_table",
    "calibrate",
    "correct_biases_",
    "float_copy",
    "parse_bits",
    "prepare",
    "project_scales_",
    "render_bits",
    "scale_parameters",
    "set_activation_mode",
]
