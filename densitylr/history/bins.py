"""The histogram of activation magnitudes: its threshold for near zero and its bins.

Magnitudes are in units of ``rms0``, the root mean square of the same layer's untrained outputs.
"""

from __future__ import annotations

import numpy as np

__all__ = ["BINS", "BOUNDS", "EDGES", "OCTAVES", "TAU"]

TAU = 0.1
"""An activation is near zero where ``|a| < TAU * rms0``."""

OCTAVES = (-5, 6)
"""The bins reach from ``TAU * 2**-5`` to ``TAU * 2**6``, 0.003 to 6.4 untrained RMS."""

EDGES: tuple[float, ...] = tuple(
    TAU * 2.0 ** (step // 4) * (1 + step % 4 / 4)
    for step in range(4 * OCTAVES[0], 4 * OCTAVES[1] + 1)
)
"""Upper edges of the bins, exclusive: four an octave, one at `TAU`. A last bin holds the rest."""

BINS = len(EDGES) + 1

BOUNDS = np.array([EDGES[0] ** 2 / EDGES[1], *EDGES, EDGES[-1] ** 2 / EDGES[-2]])
"""Where the bins begin and end, float64 ``[BINS + 1]``. The two outer bins have no end: here they
are as wide, in octaves, as their neighbours, so that they can be drawn."""
