"""Figures as PNG, one for light and one for dark pages.

`matplotlib.figure.Figure` is used without pyplot: no global state, no window, the same bytes for
the same numbers.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["Picture", "rendered"]

_THEMES = {
    "light": {"shade": 0, "paper": "#ffffff", "ink": "#1f2328", "faint": "#d4d8dd"},
    "dark": {"shade": 1, "paper": "#161b22", "ink": "#d7dde4", "faint": "#39414b"},
}


@dataclass(frozen=True)
class Picture:
    """A figure as data URIs.

    Attributes:
        light, dark: ``data:image/png;base64,…`` for the two appearances.
        width, height: CSS pixels at natural size.
        alt: what it shows, in words.
        caption: what to see in it.
        wide: too wide for a phone, where it scrolls.
    """

    light: str
    dark: str
    width: int
    height: int
    alt: str
    caption: str
    wide: bool = False


def rendered(
    draw: Any, size: tuple[float, float], alt: str, caption: str, wide: bool = False
) -> Picture:
    """Draw a figure once for light and once for dark pages.

    Args:
        draw: called with an empty figure and the theme, whose ``"paper"``, ``"ink"`` and
            ``"faint"`` are colours; ``"shade"`` is 0 on light and 1 on dark paper.
        size: inches.
        alt, caption, wide: as in `Picture`.
    """
    pictures = {}
    for name, theme in _THEMES.items():
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        style: dict[Any, Any] = dict.fromkeys(inked, theme["ink"])
        style |= dict.fromkeys(("axes.facecolor", "figure.facecolor"), theme["paper"])
        style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0}
        drawn = io.BytesIO()
        with mpl.rc_context():
            mpl.rcdefaults()  # not the user's matplotlibrc: the same bytes on every desk
            mpl.rcParams.update(style)
            figure = Figure(figsize=size, dpi=144, layout="constrained")
            draw(figure, theme)
            figure.savefig(drawn, format="png", pil_kwargs={"compress_level": 1})
        # A palette is a third of the bytes; the octree keeps rare colours, such as a thin line's.
        image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode("ascii")
        pictures[name] = f"data:image/png;base64,{data}"
    width, height = (round(96 * inches) for inches in size)
    return Picture(pictures["light"], pictures["dark"], width, height, alt, caption, wide)
