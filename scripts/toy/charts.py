"""The report's pictures as PNG bytes: curves over steps, before and after, a sheet of grounded answers."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spatialthinker.storage.images import load_image
from spatialthinker.visualize import DARK_LINE_COLORS, LINE_COLORS, Layout, color_of

DPI = 200
_SIZE_IN = (4.8, 3.3)  # small, so that the letters stay large when a phone shrinks the picture
_STYLES = ("-", "--", "-.", ":")
_LEGEND: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
_BOX_STYLES = ("--", "-")  # reference, predicted


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of screen."""

    paper: str
    ink: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#f5f6f8", "#1b1f24", "#d9dde2", LINE_COLORS)
DARK = Theme("#1e2328", "#e6e8eb", "#3d454e", DARK_LINE_COLORS)


@dataclass(frozen=True)
class Series:
    """One metric over steps."""

    label: str
    steps: list[int]
    values: list[float]


def _new_axes(theme: Theme, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_IN, dpi=DPI, layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.set_title(title, loc="left", color=theme.ink, fontsize=12, fontweight="bold")
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    return figure, axes


def _finish(figure: Any, axes: Any, theme: Theme) -> bytes:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, **_LEGEND, fontsize=10, labelcolor=theme.ink)
    return _png_of(figure)


def _png_of(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_curves(
    theme: Theme,
    title: str,
    ylabel: str,
    curves: Sequence[Series],
    markers: Sequence[Series] = (),
    band: tuple[Series, Series] | None = None,
) -> bytes:
    """Return curves over training steps; `markers` are dots at few steps, `band` a lower and an upper border."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new_axes(theme, title)
    if band is not None and band[0].values:
        low, high = band
        axes.fill_between(low.steps, low.values, high.values, color=theme.lines[0], alpha=0.2, lw=0, label=low.label)
    for curve, color, style in zip(curves, theme.lines, _STYLES, strict=False):
        if curve.values:
            dot = "o" if len(curve.values) == 1 else ""
            axes.plot(curve.steps, curve.values, color=color, linestyle=style, marker=dot, lw=1.8, label=curve.label)
    for points, color in zip(markers, theme.lines[len(curves) :], strict=False):
        if points.values:
            axes.plot(points.steps, points.values, color=color, lw=0.9, marker="o", ms=5.5, label=points.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step", color=theme.ink, fontsize=10)
    axes.set_ylabel(ylabel, color=theme.ink, fontsize=10)
    return _finish(figure, axes, theme)


def draw_changes(theme: Theme, title: str, xlabel: str, changes: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return each metric's value before and after with its 95 % interval.

    `changes` maps a metric's name to {"before", "before_interval", "after", "after_interval"}.
    """
    figure, axes = _new_axes(theme, title)
    names = list(changes)
    # Before and after lie a little apart, so that neither hides the other's interval.
    for when, color, offset, marker in (("before", 1, 0.14, "s"), ("after", 0, -0.14, "o")):
        values = np.array([changes[name][when] for name in names])
        low, high = np.array([changes[name][f"{when}_interval"] for name in names]).T
        rows, errors = len(names) - np.arange(len(names)) + offset, np.clip([values - low, high - values], 0, None)
        style = {"fmt": marker, "ms": 5.5, "capsize": 3, "lw": 1.8, "color": theme.lines[color]}
        axes.errorbar(values, rows, xerr=errors, label=when, **style)
    axes.set_yticks([len(names) - index for index in range(len(names))], names)
    axes.set_ylim(0.4, len(names) + 0.6)
    axes.set_xlabel(xlabel, color=theme.ink, fontsize=10)
    return _finish(figure, axes, theme)


def draw_pictures(pictures: Sequence[tuple[bytes, Layout]], captions: Sequence[str]) -> bytes:
    """Return a sheet of pictures with their boxes and captions, and the key of the two kinds of boxes."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows = -(-len(pictures) // 4)
    figure = Figure(figsize=(12.8, 4.1 * rows + 0.5), dpi=DPI * 3 // 4, layout="constrained", facecolor="white")
    figure.subplots(rows, 4, squeeze=False)
    for axes, (picture, layout), caption in zip(figure.axes, pictures, captions, strict=False):
        axes.imshow(load_image(picture), extent=(0, layout.width, layout.height, 0))
        for _, (x1, y1, x2, y2), is_predicted in layout.boxes:
            style = {"edgecolor": color_of(is_predicted), "linestyle": _BOX_STYLES[is_predicted], "linewidth": 1.5}
            halo = [withStroke(linewidth=3, foreground="white")]
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, path_effects=halo, **style))
        for text, (x1, y1, x2, y2), is_predicted in layout.labels:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, color=color_of(is_predicted), linewidth=0))
            axes.text((x1 + x2) / 2, (y1 + y2) / 2, text, color="white", fontsize=8, ha="center", va="center")
        lines = [wrapped for line in caption.split("\n") for wrapped in textwrap.wrap(line, 38)[:3]]
        text = "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in "\n".join(lines))
        # A model's answer is text, no formula between dollar signs.
        axes.set_title(text, fontsize=10, loc="left", color="#1b1f24", parse_math=False)
    for axes in figure.axes:
        axes.axis("off")
    handles = [
        Line2D([], [], color=color_of(is_predicted), linestyle=_BOX_STYLES[is_predicted], linewidth=2.5, label=label)
        for label, is_predicted in (("predicted", True), ("reference", False))
    ]
    figure.legend(handles=handles, **_LEGEND, fontsize=12)
    return _png_of(figure)
