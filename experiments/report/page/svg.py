"""Line charts as inline SVG: one picture for light and dark pages, marks that say what they are.

Sizes and letters come from the page's style sheet (classes ``axis``, ``rule``, ``line``, ``band``,
``mark``); each line carries its colour for light and for dark paper. A mark is a link with a name,
so that a pointer, a keyboard and a screen reader all find out what it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

__all__ = ["ARM_COLOURS", "Chart", "Line", "Mark", "chart", "stage_colours"]

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 42
# Okabe and Ito's colours, which any colour vision tells apart, darker on white and lighter on
# black where they would be too faint.
ARM_COLOURS = (
    ("#0072b2", "#4aa8e8"),
    ("#c04f00", "#f28a4b"),
    ("#007a58", "#2bbf94"),
    ("#a8508a", "#dd94c0"),
    ("#8a6d00", "#e0b030"),
    ("#555b63", "#a9b2bd"),
)
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_SHAPES = {
    "raise": "M0-6 5.5 4-5.5 4z",
    "lower": "M0 6 5.5-4-5.5-4z",
    "lift-off": "M0-7 1.9-2.2 7-2.2 2.9 1 4.4 6 0 3-4.4 6-2.9 1-7-2.2-1.9-2.2z",
    "diverged": "M-4-4 4 4M4-4-4 4",
}
_DOT = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"


@dataclass(frozen=True)
class Line:
    """A line through points; ``held`` ones keep a value until the next point.

    Attributes:
        name: for the legend.
        points: x and y; a point that is not finite, or not positive on a logarithmic axis,
            interrupts the line.
        colour: on light and on dark paper.
        dashed, held: how it is drawn.
        spread: lowest and highest y at each x, drawn as a band.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: tuple[str, str]
    dashed: bool = False
    held: bool = False
    spread: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """A point with a meaning.

    Attributes:
        x, y: where.
        kind: ``"raise"``, ``"lower"``, ``"lift-off"``, ``"diverged"``; anything else is a dot.
        text: what it stands for, shown on hover and read out.
        colour: on light and on dark paper.
        href: where a click leads; empty for a plain mark.
    """

    x: float
    y: float
    kind: str
    text: str
    colour: tuple[str, str]
    href: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        svg: markup.
        alt: what it shows, in words.
        caption: what to see in it.
        legend: names and colours of the lines, with True for dashed ones.
    """

    svg: Markup
    alt: str
    caption: str
    legend: list[tuple[str, tuple[str, str], bool]] = field(default_factory=list)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        at, low, high = (math.log10(v) if self.log else v for v in (value, self.low, self.high))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def usable(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            if last - first >= 2:
                return [10.0**k for k in range(first, last + 1, max(1, (last - first) // 5))]
            decades = range(math.floor(math.log10(self.low)), last + 1)
            some = [m * 10.0**k for k in decades for m in (1, 2, 5)]
            return [v for v in some if self.low <= v <= self.high]
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(m * size for m in (1, 2, 5, 10) if (self.high - self.low) / (m * size) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    x: str,
    y: str,
    alt: str,
    caption: str,
    log_x: bool = False,
    log_y: bool = False,
    level: float | None = None,
) -> Chart | None:
    """Draw lines and marks.

    Args:
        lines: what to draw.
        marks: drawn above the lines.
        x, y: labels of the axes, with units.
        alt, caption: as in `Chart`.
        log_x, log_y: logarithmic axes.
        level: height of a horizontal line to compare with.

    Returns:
        The chart; None where no point can be drawn.
    """
    points = [p for line in lines for p in line.points]
    points += [(at, v) for line in lines for at, low, high in line.spread for v in (low, high)]
    points += [(mark.x, mark.y) for mark in marks]
    points = [p for p in points if all(map(math.isfinite, p))]
    points = [(a, b) for a, b in points if (a > 0 or not log_x) and (b > 0 or not log_y)]
    if not points:
        return None
    heights = [b for _, b in points] + ([level] if level is not None else [])
    across = _axis([a for a, _ in points], log_x, LEFT, WIDTH - RIGHT, margin=0.0)
    up = _axis(heights, log_y, HEIGHT - BOTTOM, TOP, margin=0.05)
    parts = [_frame(across, up, x, y)]
    if level is not None:
        parts.append(
            Markup('<path class="level" d="M{} {:.1f}H{}"/>').format(LEFT, up(level), WIDTH - RIGHT)
        )
    for line in lines:
        parts.append(_drawn(line, across, up))
    parts += [_marked(m, across, up) for m in marks if across.usable(m.x) and up.usable(m.y)]
    svg = Markup('<svg viewBox="0 0 {} {}" role="group" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, alt, Markup("").join(parts)
    )
    return Chart(svg, alt, caption, [(line.name, line.colour, line.dashed) for line in lines])


def stage_colours(count: int) -> list[tuple[str, str]]:
    """Colours for stages from the first to the last: one map, dark on white, light on black."""

    def at(share: float) -> str:
        place = share * (len(_VIRIDIS) - 1)
        i = min(int(place), len(_VIRIDIS) - 2)
        mixed = (
            a + (b - a) * (place - i) for a, b in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True)
        )
        return "#" + "".join(f"{round(v):02x}" for v in mixed)

    shares = [i / max(1, count - 1) for i in range(count)]
    return [(at(0.75 * s), at(0.35 + 0.65 * s)) for s in shares]


def _axis(values: Sequence[float], log: bool, start: float, stop: float, margin: float) -> _Axis:
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    low, high = low - margin * (high - low), high + margin * (high - low)
    if log:
        low, high = 10.0**low, 10.0**high
    return _Axis(low, high, log, start, stop)


def _frame(across: _Axis, up: _Axis, x: str, y: str) -> Markup:
    foot, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    parts = []
    for tick in up.ticks():
        at = up(tick)
        parts.append(
            Markup('<path class="rule" d="M{} {:.1f}H{}"/>').format(LEFT, at, WIDTH - RIGHT)
        )
        parts.append(
            Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(
                LEFT - 6, at + 4, _tick(tick)
            )
        )
    for tick in across.ticks():
        at = across(tick)
        parts.append(Markup('<path class="rule" d="M{:.1f} {}V{}"/>').format(at, TOP, foot))
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="middle">{}</text>').format(
                at, foot + 16, _tick(tick)
            )
        )
    parts.append(
        Markup('<path class="axis" d="M{} {}V{}H{}"/>').format(LEFT, TOP, foot, WIDTH - RIGHT)
    )
    parts.append(
        Markup('<text x="{}" y="{}" class="middle">{}</text>').format(middle, HEIGHT - 6, x)
    )
    parts.append(
        Markup('<text transform="translate(13 {}) rotate(-90)" class="middle">{}</text>').format(
            (TOP + foot) / 2, y
        )
    )
    return Markup('<g aria-hidden="true">{}</g>').format(Markup("").join(parts))


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.10g}".replace("-", "−")
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def _drawn(line: Line, across: _Axis, up: _Axis) -> Markup:
    style = Markup("--l:{};--d:{}").format(*line.colour)
    band = Markup("")
    spread = [s for s in line.spread if across.usable(s[0]) and up.usable(s[1]) and up.usable(s[2])]
    if len(spread) > 1:
        there = [f"{across(at):.1f} {up(high):.1f}" for at, _, high in spread]
        back = [f"{across(at):.1f} {up(low):.1f}" for at, low, _ in reversed(spread)]
        band = Markup('<path class="band" style="{}" d="M{}z"/>').format(
            style, "L".join([*there, *back])
        )
    path, height, pen = [], 0.0, False
    for at, value in line.points:
        if not (across.usable(at) and up.usable(value)):
            pen = False
            continue
        if pen and line.held:
            path.append(f"H{across(at):.1f}")
            if abs(up(value) - height) >= 0.05:
                path.append(f"V{up(value):.1f}")
        else:
            path.append(f"{'L' if pen else 'M'}{across(at):.1f} {up(value):.1f}")
        height, pen = up(value), True
    kind = "line dashed" if line.dashed else "line"
    drawn = Markup('<path class="{}" style="{}" d="{}"/>').format(kind, style, "".join(path))
    return Markup('<g aria-hidden="true">{}{}</g>').format(band, drawn)


def _marked(mark: Mark, across: _Axis, up: _Axis) -> Markup:
    shape = Markup(
        '<path class="{}" style="--l:{};--d:{}" transform="translate({:.1f} {:.1f})" d="{}"/>'
    ).format(
        "mark open" if mark.kind == "diverged" else "mark",
        *mark.colour,
        across(mark.x),
        up(mark.y),
        _SHAPES.get(mark.kind, _DOT),
    )
    title = Markup("<title>{}</title>").format(mark.text)
    if not mark.href:
        return Markup('<g role="img" aria-label="{}">{}{}</g>').format(mark.text, title, shape)
    return Markup('<a href="{}" aria-label="{}">{}{}</a>').format(
        escape(mark.href), mark.text, title, shape
    )
