"""Find options without effect on a method. Setting one is an error of the user."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..quantization import QuantizationConfig
from .base import Method

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["why_unused"]

#: Options of the command line that only methods with iterations use.
_OF_TRAINING = (
    "schedule_share",
    "training_pixels",
    "minutes",
    "max_time",
    "evaluate_every",
    "evaluate_limit",
    "keep_best",
)
#: Options for the float network and the generator during distillation.
_OF_DISTILLATION = ("precision", "cuda_graphs")


def why_unused(
    option: str,
    name: str,
    method: type[Method],
    settings: MethodSettings,
    quantization: QuantizationConfig,
) -> str | None:
    """Return why ``option`` changes nothing in what ``method`` computes; None if it has an effect.

    Args:
        option: Dotted name, such as "quantization.weight_range" or "settings.fdda.lr".
        name: Name of the method on the command line.
        method: Class of the method.
        settings: Settings of all methods.
        quantization: Bits, grid and ranges.
    """
    section, _, rest = option.partition(".")
    if section in _OF_TRAINING and not method.trains:
        return f"{name} has no training"
    if section in _OF_DISTILLATION and not method.distils:
        return f"{name} runs the float network in float32, without CUDA graphs"
    if section in ("images_per_class", "augmented_images") and not method.real_images:
        return f"{name} uses no real images"
    if section == "quantization" and rest:
        return _unused_quantization(rest, name, method, settings, quantization)
    if section == "settings" and rest:
        return _unused_setting(rest, name, method, settings)
    return None


def _unused_quantization(
    field: str,
    name: str,
    method: type[Method],
    settings: MethodSettings,
    quantization: QuantizationConfig,
) -> str | None:
    ranges = {str(quantization.weight_range), str(quantization.activation_range)}
    if field in method.fixed_ranges:
        return f"{name} always uses {method.fixed_ranges[field]}"
    if method.fixed_ranges:
        ranges = set(method.fixed_ranges.values())
    if field == "percentile" and "percentile" not in ranges:
        return "no range is found by percentile"
    if field == "lp_exponent" and ("lp" not in ranges or method.fixed_ranges):
        return "no range is found by lp" if "lp" not in ranges else f"{name} tries exponents itself"
    if field == "momentum" and not method.observes(settings):
        return f"{name} sets every range at once, without a moving average"
    if field in ("learn_zero_points", "scale_gradient") and not method.learns_ranges:
        return f"{name} does not learn ranges by gradients"
    of_deploy = ("image_bits", "pooled_bits", "learn_zero_points", "scale_gradient")
    if field in of_deploy and quantization.grid != "deploy":
        return f"grid {quantization.grid} has none"
    return None


def _unused_setting(
    path: str, name: str, method: type[Method], settings: MethodSettings
) -> str | None:
    section, _, field = path.partition(".")
    known = {f.name for f in fields(settings)}
    if section in known and section not in method.sections:
        own = " and ".join(f"settings.{s}" for s in method.sections)
        return f"{name} reads only {own}" if own else f"{name} has no settings"
    step = settings.distillation
    if section == "distillation" and step.steps == 0 and field not in ("", "steps"):
        return "no student step is taken with settings.distillation.steps 0"
    if section == "distillation" and field in step.unused:
        return step.unused[field]
    if field == "range_iterations" and not method.observes(settings):
        return f"ranges do not come from settings.{section}.ranges_from generated"
    return None
