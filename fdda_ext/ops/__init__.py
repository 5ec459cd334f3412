"""Public wrappers of the native operators, with fake kernels, autograd and plain references.

Importing this package registers ``torch.ops.fdda.*`` for the CPU and, if built, for CUDA.
"""

import fdda_ext.ops.int4_program  # noqa: F401  (registers fake kernels)
from fdda_ext.ops.class_batch_stats import class_batch_stats
from fdda_ext.ops.class_stats_loss import class_stats_loss
from fdda_ext.ops.fake_quantize import fake_quantize
from fdda_ext.ops.int4_conv2d import int4_conv2d, int4_linear, int4_pack_weight
from fdda_ext.ops.reference import (
    class_batch_stats_reference,
    class_stats_loss_reference,
    fake_quantize_reference,
)

__all__ = [
    "class_batch_stats",
    "class_batch_stats_reference",
    "class_stats_loss",
    "class_stats_loss_reference",
    "fake_quantize",
    "fake_quantize_reference",
    "int4_conv2d",
    "int4_linear",
    "int4_pack_weight",
]
