"""Draws the model card's charts with matplotlib, as SVG that is part of the page and takes its colours.

The same numbers give the same bytes: no date, no random names. Text stays text, so it can be read aloud and
searched. Never computes a figure. Imported by `card_evidence` when a card is drawn, and only if matplotlib is
installed (the `training` extra); the rest of the project never needs it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from app.ai.domain import FloatArray
from app.training.reliability import ReliabilityBin

MAX_BARS = 15
_WIDTH = 5.6  # inches; the page scales it

# Stand-ins for the page's own colours, which follow its light or dark scheme.
_INK, _MUTED, _ACCENT, _BAND = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _ACCENT: "var(--accent)", _BAND: "var(--band)"}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "model card",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _BAND,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}


def draw_reliability(bins: Sequence[ReliabilityBin], alt: str) -> str:
    """Draws the observed against the predicted share, over the band of a perfectly calibrated model."""

    def draw(axes: Axes) -> None:
        predicted = [entry.predicted for entry in bins]
        low, high = [entry.low for entry in bins], [entry.high for entry in bins]
        axes.fill_between(predicted, low, high, color=_BAND, linewidth=0, label="chance alone, 95 in 100")
        axes.plot((0, 1), (0, 1), color=_MUTED, linestyle="--", linewidth=1, label="perfectly calibrated")
        axes.plot(
            predicted, [entry.observed for entry in bins],
            color=_ACCENT, marker="o", markersize=5, linewidth=1, label="this model",
        )  # fmt: skip
        _share_axes(axes, "predicted probability", "share that reached the outcome")
        axes.legend(loc="upper left")

    return _draw("reliability", draw, alt)


def draw_roc(points: FloatArray, alt: str) -> str:
    """Draws the receiver operating characteristic through points (p, 2)."""

    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=_MUTED, linestyle="--", linewidth=1, label="calling at random")
        axes.plot(*points.T, color=_ACCENT, label="this model")
        _share_axes(axes, "others called in vain", "outcomes found")
        axes.legend(loc="lower right")

    return _draw("roc", draw, alt)


def draw_precision_recall(points: FloatArray, base_rate: float, alt: str) -> str:
    """Draws precision against recall through points (p, 2), over the rate calling at random would give."""

    def draw(axes: Axes) -> None:
        axes.axhline(base_rate, color=_MUTED, linestyle="--", linewidth=1, label="calling at random")
        axes.plot(*points.T, color=_ACCENT, label="this model")
        _share_axes(axes, "outcomes found", "outcomes among those called")
        axes.legend(loc="lower left")

    return _draw("precision-recall", draw, alt)


def draw_gain(points: FloatArray, base_rate: float, alt: str) -> str:
    """Draws the share of outcomes found (p, 2) against the share of leads called, best first."""

    def draw(axes: Axes) -> None:
        axes.plot((0, base_rate, 1), (0, 1, 1), color=_MUTED, linestyle=":", linewidth=1, label="hindsight")
        axes.plot(*points.T, color=_ACCENT, label="this model")
        axes.plot((0, 1), (0, 1), color=_MUTED, linestyle="--", linewidth=1, label="calling at random")
        _share_axes(axes, "leads called, highest probability first", "outcomes found")
        axes.legend(loc="lower right")

    return _draw("gain", draw, alt)


def draw_importance(importance: Mapping[str, Sequence[float]], alt: str) -> str:
    """Draws the mean loss of each feature as a bar, with a line from its lowest to its highest shuffle."""
    shown = [(_shorten(name), losses) for name, losses in list(importance.items())[:MAX_BARS]][::-1]

    def draw(axes: Axes) -> None:
        rows = range(len(shown))
        axes.barh(rows, [sum(losses) / len(losses) for _, losses in shown], color=_ACCENT, height=0.6)
        axes.hlines(
            rows, [min(losses) for _, losses in shown], [max(losses) for _, losses in shown], color=_INK
        )
        axes.set_yticks(rows, [name for name, _ in shown])
        axes.set_xlabel("ROC AUC lost when shuffled")
        axes.grid(visible=False, axis="y")

    left = 0.3 + 0.085 * max((len(name) for name, _ in shown), default=0)
    return _draw("importance", draw, alt, height=0.8 + 0.3 * len(shown), left=left)


def _share_axes(axes: Axes, across: str, up: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=across, ylabel=up)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _draw(
    name: str, draw: Callable[[Axes], None], alt: str, *, height: float = 4.2, left: float = 0.85
) -> str:
    """Returns one chart; `height` and the margin `left` of the axes are in inches."""
    # The defaults first: whatever a matplotlibrc says must not change the page.
    with rc_context({**rcParamsDefault, **_SETTINGS}):
        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.add_axes((left / _WIDTH, 0.55 / height, 1 - (left + 0.3) / _WIDTH, 1 - 0.65 / height))
        axes.set_axisbelow(True)
        draw(axes)
        for artist in (figure.patch, axes.patch):
            artist.set_visible(False)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _embed(out.getvalue(), name, alt)


def _embed(svg: str, name: str, alt: str) -> str:
    """Makes a document of its own into a part of a page: with IDs, colours and fonts that suit the page."""
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head = re.search(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', body)
    if head is None:
        raise ValueError("matplotlib wrote no SVG")
    body = body[head.end() :].replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-")
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("'DejaVu Sans'", "system-ui")
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, variable)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    return f'<svg {head[1]} role="img" aria-label="{escape(alt)}">{body}'


def _shorten(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
