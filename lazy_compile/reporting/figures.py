"""The figures of a report, each drawn once for light and once for dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lazy_compile.errors import import_optional, one_line
from lazy_compile.reporting.markup import Markup, render

Floats = npt.NDArray[np.float64]
Draw = Callable[["Theme"], Any]
"""Makes a matplotlib figure in the colours of a theme."""

LABELS = {
    "dense": "dense",
    "ddim": "fewer steps",
    "fora2": "every 2nd step (FORA)",
    "fora2_last": "every 2nd step, repeated",
    "random": "random schedule",
    "planned": "planned schedule",
    "lazy": "lazy gates",
}

_MARKERS = {"ddim": "s", "fora2": "^", "fora2_last": "v", "random": "x", "planned": "D", "lazy": "o", "dense": "*"}


@dataclass(frozen=True)
class Theme:
    """Colours of one page: text, lines, the method that matters, and the others in order."""

    text: str
    line: str
    accent: str
    others: Mapping[str, str]
    empty: str


LIGHT = Theme(
    "#22262e", "#d9dce3", "#c2410c",
    {"dense": "#22262e", "ddim": "#2563a8", "fora2": "#3f8f5b", "fora2_last": "#93c3a3", "random": "#9aa1ad",
     "planned": "#8a5cc2"}, "#f1f2f5",
)  # fmt: skip
DARK = Theme(
    "#dfe3ea", "#3a404b", "#fb923c",
    {"dense": "#dfe3ea", "ddim": "#6cb0f5", "fora2": "#6fcf97", "fora2_last": "#3f7d59", "random": "#7c8492",
     "planned": "#b794f4"}, "#22262e",
)  # fmt: skip


def picture(draw: Draw, alt: str) -> Markup:
    """HTML of a figure that follows the page's colour scheme: one drawing, two themes."""
    light, dark = (_png(draw, theme) for theme in (LIGHT, DARK))
    return render(
        '<picture><source srcset="{{ dark }}" media="(prefers-color-scheme: dark)">'
        '<img src="{{ light }}" alt="{{ alt }}"></picture>',
        dark=dark, light=light, alt=alt,
    )  # fmt: skip


def pixels(images: Floats) -> str:
    """Data URI of images ``float[N, C, H, W]`` in -1 to 1, side by side at their own size."""
    image = import_optional("matplotlib.image", "demo")
    clipped = np.clip((images + 1) / 2, 0, 1)
    gap = np.full((*clipped.shape[:3], 1), np.nan)
    strip = np.concatenate([part for one in clipped for part in (one, gap[0])][:-1], axis=-1)
    channels = np.concatenate([strip[:3] if len(strip) >= 3 else np.repeat(strip[:1], 3, axis=0), strip[:1]])
    rgba = np.where(np.isnan(channels), 0.0, channels)
    rgba[3] = ~np.isnan(channels[3])
    buffer = io.BytesIO()
    image.imsave(buffer, np.moveaxis(rgba, 0, -1), format="png")
    return _data_uri(buffer)


def quality_against_compute(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """Two panels over the share of MACs spent: distance to the reference, by pixels and by features."""

    def draw(theme: Theme) -> Any:
        figure = _figure(height=4.1)
        axes = figure.subplots(1, 2)
        panels = (("rmse_reference", "RMSE to the reference"), ("frechet", "Fréchet distance, digits features"))
        for axis, (key, title) in zip(axes, panels, strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                mine = [row for row in rows if row["method"] == method]
                points = sorted((row["compute_ratio"], row[key], row.get(f"{key}_std", 0.0)) for row in mine)
                x, y, spread = zip(*points, strict=True)
                ours = method == "lazy"
                axis.errorbar(
                    x, y, yerr=spread, marker=_MARKERS.get(method, "."), label=_plain(LABELS.get(method, method)),
                    color=theme.accent if ours else theme.others.get(method, theme.text),
                    linewidth=2.2 if ours else 1.1, markersize=8 if ours or method == "dense" else 6, capsize=2.5,
                    elinewidth=1, zorder=3 if ours else 2,
                )  # fmt: skip
            axis.set_title(title, fontsize=11, color=theme.text, loc="left")
            axis.set_xlabel("MACs spent, share of the dense model's")
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            _style(axis, theme)
            axis.grid(color=theme.line, linewidth=0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False,
            labelcolor=theme.text, fontsize=9,
        )  # fmt: skip
        return figure

    return draw


def reuse_maps(maps: Mapping[str, Floats], branches: Sequence[str]) -> Draw:
    """For each title ``shares: float64[steps, branches]``; a full cell is reused by every sample."""

    def draw(theme: Theme) -> Any:
        shades = _shades(theme.empty, theme.accent)
        figure = _figure(height=1.3 + 0.24 * len(branches))
        axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)
        for axis, (title, shares) in zip(axes[0], maps.items(), strict=True):
            image = axis.imshow(shares.T, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axis.set_title(_plain(title), fontsize=11, color=theme.text, loc="left")
            axis.set_xlabel("denoising step")
            axis.set_xticks(range(0, len(shares), max(1, len(shares) // 10)))
            axis.set_yticks(range(len(branches)), list(map(_plain, branches)), fontsize=8)
            axis.set_xticks(np.arange(-0.5, len(shares)), minor=True)
            axis.set_yticks(np.arange(-0.5, len(branches)), minor=True)
            _style(axis, theme)
            axis.grid(which="minor", color=theme.line, linewidth=0.5)
            axis.tick_params(which="both", length=0)
        bar = figure.colorbar(image, ax=axes[0], pad=0.01, fraction=0.03)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        bar.set_label("samples that reuse", color=theme.text)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=theme.text, length=0)
        return figure

    return draw


def gate_biases(bias: Floats, knots: Floats, branches: Sequence[str]) -> Draw:
    """``bias: float64[knots, branches]``: what each gate says before it reads its input."""

    def draw(theme: Theme) -> Any:
        shades = _shades(theme.accent, theme.empty, theme.others["ddim"])
        limit = float(np.quantile(np.abs(bias[np.isfinite(bias)]), 0.75)) or 1.0
        figure = _figure(height=1.3 + 0.24 * len(branches))
        axis = figure.subplots()
        image = axis.imshow(bias.T, cmap=shades, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set_yticks(range(len(branches)), list(map(_plain, branches)), fontsize=8)
        axis.set_xticks(range(len(knots)), [f"{knot:g}" for knot in knots], fontsize=8, rotation=60)
        axis.set_xlabel("time input")
        _style(axis, theme)
        axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03, ticks=[-limit, 0, limit])
        bar.ax.set_yticklabels(["reuse", "even", "compute"])
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=theme.text, length=0)
        return figure

    return draw


def _plain(name: str) -> str:
    """A name as text: between two dollar signs matplotlib reads formulas."""
    return one_line(name, 80).replace("\\", "/").replace("$", r"\$")


def _style(axis: Any, theme: Theme) -> None:
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)
    axis.tick_params(colors=theme.text, which="both")
    axis.xaxis.label.set_color(theme.text)
    axis.yaxis.label.set_color(theme.text)
    axis.set_facecolor("none")


def _figure(height: float) -> Any:
    return import_optional("matplotlib.figure", "demo").Figure(figsize=(10.4, height), layout="constrained")


def _shades(*colours: str) -> Any:
    colors = import_optional("matplotlib.colors", "demo")
    return colors.LinearSegmentedColormap.from_list("shades", colours)


def _png(draw: Draw, theme: Theme) -> str:
    buffer = io.BytesIO()
    draw(theme).savefig(buffer, format="png", dpi=160, transparent=True)
    return _data_uri(buffer)


def _data_uri(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
