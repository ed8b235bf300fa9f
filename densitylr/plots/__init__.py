"""Pictures of a history: what the activations did, and what was decided about the rates.

One function a figure, each takes a `History` and returns a matplotlib ``Figure`` outside of
pyplot: no window, no global state, nothing to close. ``figure.savefig("density.png")``.
"""

from densitylr.plots.curves import near_zero, rates
from densitylr.plots.heatmaps import density_heatmap, density_heatmaps
from densitylr.plots.together import overview

__all__ = ["density_heatmap", "density_heatmaps", "near_zero", "overview", "rates"]
