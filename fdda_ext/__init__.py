"""FDDA: four-bit post-training quantization of CNNs from one labelled image per class.

Importing the package loads its native part and registers ``torch.ops.fdda.*``.
"""

import torch  # noqa: F401  (the native part links against libtorch, which this loads)

from fdda_ext.about import BuildInfo, build_info
from fdda_ext.version import __version__

__all__ = ["BuildInfo", "__version__", "build_info"]
