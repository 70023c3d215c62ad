"""The plots of README, results and gates, from docs/results: ``python docs/images/draw.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lazy_compile.reporting.figures import LIGHT

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"


def draw_quality(path: Path) -> None:
    """Error over compute, from the table of results."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), facecolor="white")
    for axis, model in zip(axes, ("digits DiT", "scenes MMDiT"), strict=True):
        own = [row for row in rows if row["model"] == model and 0.3 <= row["compute_ratio"] <= 0.78]
        _points(axis, own)
        axis.set_title(model, color=LIGHT.text, fontsize=11)
        axis.set_xlabel("MACs spent, share of the dense model's", color=LIGHT.text)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axis.set_yscale("log")
        axis.grid(True, which="both", color=LIGHT.line, linewidth=0.4)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("RMSE to the dense samples", color=LIGHT.text)
    axes[1].legend(frameon=False, fontsize=9, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _points(axis: Any, rows: list[dict[str, Any]]) -> None:
    def select(wanted: Any) -> list[dict[str, Any]]:
        return sorted(filter(wanted, rows), key=lambda row: row["compute_ratio"])

    solver = {"fewer steps", "DPM-Solver++ 2M"}
    aside = ("oracle", "plan", "gates", "random")
    for label, chosen, style in (
        ("simple rules", select(lambda row: row["method"] not in solver and not row["method"].startswith(aside)),
         {"color": LIGHT.others["random"], "marker": "o", "linestyle": "", "markersize": 5}),
        ("fewer steps", select(lambda row: row["method"] == "fewer steps"),
         {"color": LIGHT.others["ddim"], "marker": "s", "markersize": 5}),
        ("planned schedule", select(lambda row: row["method"] == "plan"),
         {"color": LIGHT.accent, "marker": "D", "linewidth": 2, "markersize": 6}),
        ("trained gates", select(lambda row: row["method"] == "gates"),
         {"color": LIGHT.others["planned"], "marker": "x", "linestyle": "", "markersize": 7}),
    ):  # fmt: skip
        assert chosen, f"docs/results/quality.json has no rows for {label}"
        x, y = zip(*((row["compute_ratio"], row["rmse_dense"]) for row in chosen), strict=True)
        assert all(map(math.isfinite, y))
        axis.plot(x, y, label=label, **style)


def draw_gates(path: Path) -> None:
    """What plans, gates and an oracle reach at each budget."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), facecolor="white")
    styles = {
        "plan": ("plan", LIGHT.accent, "D"),
        "gates": ("trained gates", LIGHT.others["planned"], "x"),
        "plan, where the oracle was asked": ("plan, on the oracle's images", LIGHT.others["ddim"], "s"),
        "oracle for each sample": ("oracle, a schedule for each sample", LIGHT.others["random"], "*"),
    }
    for axis, model in zip(axes, ("digits DiT", "scenes MMDiT"), strict=True):
        for method, (label, colour, marker) in styles.items():
            own = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            own.sort(key=lambda row: row["compute_ratio"])
            x, y, spread = zip(*((row["compute_ratio"], row["rmse_dense"], row["spread"]) for row in own), strict=True)
            axis.errorbar(x, y, yerr=spread, label=label, color=colour, marker=marker, capsize=2, linewidth=1)
        axis.set_title(model, color=LIGHT.text, fontsize=11)
        axis.set_xlabel("MACs spent, share of the dense model's", color=LIGHT.text)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axis.set_yscale("log")
        axis.grid(True, which="both", color=LIGHT.line, linewidth=0.4)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("RMSE to the dense samples", color=LIGHT.text)
    axes[1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw_quality(HERE / "quality.png")
    draw_gates(HERE / "gates.png")
