"""QDrop+: QDrop for few images, with roundings that keep the means of channels.

It learns like `fdda_ext.methods.qdrop`. Its preset differs in

* ``keep_means``: a layer's bias follows its weights, so roundings need not keep the mean output
  (bias correction, Nagel et al., ICCV 2019, section 4.2);
* ``augmented_images``: random views of the calibration images, if there are few (learning from many
  views of one image: Asano and Saeed, ICLR 2023);
* wider ranges, smaller batches, more steps, and a higher learning rate of roundings.
"""

from __future__ import annotations

from .qdrop import QDrop

__all__ = ["QDropPlus"]


class QDropPlus(QDrop):
    """QDrop with presets of its own."""

    summary = "qdrop with random views of few images and roundings that keep channel means"
    presets = "qdrop_plus"
