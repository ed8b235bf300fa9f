"""The diagnosis as one HTML page: no network, light and dark, down to a phone's width."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from densitylr.doctor.report.advice import Advice
from densitylr.doctor.report.report import ModelReport, Report
from densitylr.doctor.report.verdicts import FINE, ILL, StageVerdict
from densitylr.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fbfbfa; --soft: #666d75;
  --line: #d9dcdf; --card: #fff; --ill: #b3261e; --fine: #1f7a4d; --unsure: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #14171a;
  --soft: #9aa3ab; --line: #343a40; --card: #1c2024; --ill: #ff8a80; --fine: #6fd19d;
  --unsure: #e5b94e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; } h3 { font-size: 1rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .verdict { font-size: 1.1rem; }
.stage { display: grid; grid-template-columns: 11rem 9rem 1fr; gap: .2rem 1rem; padding: .7rem 0;
  border-top: 1px solid var(--line); }
.stage b { display: block; } .stage svg { width: 9rem; height: 2.2rem; color: var(--soft); }
.ill { color: var(--ill); } .fine { color: var(--fine); } .unsure { color: var(--unsure); }
@media (max-width: 40rem) { .stage { grid-template-columns: 1fr auto; }
  .stage p { grid-column: 1 / -1; margin: 0; } }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .7rem .9rem; overflow-x: auto; font: .9rem/1.45 ui-monospace, monospace; }
.wide { overflow-x: auto; margin: 1rem 0; }
img { width: 100%; min-width: 34rem; background: #fff; border-radius: .4rem; }
"""


def page(found: Report, histories: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        found: what was found.
        histories: the file with the history of each model, by the model's name.
    """
    body = [f"<h1>{escape(found.headline)}</h1>"]
    for model in found.models:
        body += _model_report(model, histories[model.name])
    if found.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
        body.append(f"<h2>What could not be followed</h2><ul>{items}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>densitylr: {escape(found.command)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _model_report(model: ModelReport, file: str) -> list[str]:
    tone = _tone_of_all(model.stages)
    parts = [
        f"<h2>{escape(model.title)}</h2>",
        f'<p class="verdict {tone}">{escape(model.verdict)}</p>',
        *(_stage(state) for state in model.stages),
        *(_advice(number, advice) for number, advice in enumerate(model.advice, 1)),
    ]
    if model.stages:
        parts.append(_pictures(model))
        parts.append(
            f'<p class="soft">Every reading: <code>densitylr.History.load("{escape(file)}")</code>'
            "</p>"
        )
    return parts


def _stage(state: StageVerdict) -> str:
    return (
        f'<div class="stage"><div><b>{escape(state.stage)}</b>'
        f'<span class="{_tone(state)}">{escape(state.word)}</span> '
        f'<span class="soft">rate {state.rate:.1e}</span></div>'
        f"{_line(state.density)}<p>{escape(state.evidence)}</p></div>"
    )


def _line(values: np.ndarray) -> str:
    """The near-zero density over time, from 0 to its largest value."""
    read = np.flatnonzero(np.isfinite(values))
    largest = values[read].max() if len(read) else 0.0
    if not largest > 0:
        return "<svg></svg>"
    x = read / max(1, len(values) - 1) * 100
    y = 28 - values[read] / largest * 26
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" '
        f'aria-label="near-zero density, {values[read[0]]:.3f} at first, {values[read[-1]]:.3f} '
        f'at last"><polyline points="{points}" fill="none" stroke="currentColor" '
        'stroke-width="1.5" vector-effect="non-scaling-stroke"/></svg>'
    )


def _advice(number: int, advice: Advice) -> str:
    remedies = "".join(
        f"<p>{escape(remedy.text)}:</p><pre>{escape(remedy.code)}</pre>"
        for remedy in advice.remedies
    )
    return f"<h3>{number}. {advice.word}: {escape(', '.join(advice.stages))}</h3>{remedies}"


def _pictures(model: ModelReport) -> str:
    try:
        from densitylr import plots
    except ImportError:
        return (
            '<p class="soft">Without matplotlib there are no pictures: '
            "<code>pip install 'densitylr[doctor]'</code></p>"
        )
    history = model.history
    draw: list[Callable[[History], Figure]] = [plots.density_heatmaps, plots.near_zero]
    if model.acting:
        draw.append(plots.rates)
    else:  # the decisions were not applied, so they get no marks
        history = History(history.budget)
        for reading, own, scales in model.history.observations():
            history.record(reading, own, scales)
    return "".join(
        f'<div class="wide"><img alt="{escape(function.__doc__ or "").partition(chr(10))[0]}" '
        f'src="data:image/png;base64,{_png(function(history))}"></div>'
        for function in draw
    )


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return base64.b64encode(file.getvalue()).decode()


def _tone(state: StageVerdict) -> str:
    return "ill" if state.word in ILL else "fine" if state.word in FINE else "unsure"


def _tone_of_all(found: list[StageVerdict]) -> str:
    tones = {_tone(state) for state in found}
    return next((tone for tone in ("ill", "unsure", "fine") if tone in tones), "unsure")
