"""The plots and pictures of README and results: ``python docs/images/draw.py``, a minute on one core."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import lazy_compile
from lazy_compile import Budget, Scheduled, plan
from lazy_compile.bench.tasks import digits
from lazy_compile.bench.tasks.training import default_checkpoints
from lazy_compile.demo.comparison import FIRST_EVALUATION_SEED, DemoSettings
from lazy_compile.reporting.figures import LIGHT

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
SHOWN = 20
TARGET = 0.5
GAIN = 10
"""How much brighter than they are errors are drawn, so that they can be seen."""


def draw_samples(path: Path) -> None:
    """The demonstration's images: dense, under the planned schedule, and with fewer dense steps of no less compute."""
    settings = DemoSettings()
    model = digits.load_or_train_digits_dit(default_checkpoints("digits") / "digits_dit.safetensors")
    lazy = lazy_compile.transform(model, digits.example_inputs())
    budget = Budget(lazy_ratio=TARGET)
    lazy.policy = Scheduled(plan(lazy, settings.sampler(settings.plan_batch), budget, options=settings.search))
    seed, sampler = FIRST_EVALUATION_SEED, settings.sampler(settings.samples)
    dense, planned = sampler(model, seed), sampler(lazy, seed)
    rows = json.loads((RESULTS / "digits.json").read_text())["rows"]
    measured = {(row["method"], row["target"]): row for row in rows}
    ours, fewer = measured["planned", TARGET], measured["ddim", TARGET]
    steps = fewer["sampler_steps"]
    few = settings.sampler(settings.samples, steps)(model, seed)
    _strips(
        path,
        {
            f"dense, {settings.steps} steps\n100% of the MACs": dense,
            f"planned, {settings.steps} steps\n{ours['compute_ratio']:.0%} of the MACs": planned,
            f"its error, {GAIN} times as bright\nRMSE {ours['rmse_dense']:.4f}": (planned - dense).abs() * GAIN - 1,
            f"dense, {steps} steps\n{fewer['compute_ratio']:.0%} of the MACs": few,
            f"its error, {GAIN} times as bright\nRMSE {fewer['rmse_dense']:.4f}": (few - dense).abs() * GAIN - 1,
        },
    )


def _strips(path: Path, rows: dict[str, Tensor]) -> None:
    figure, axes = plt.subplots(len(rows), 1, figsize=(11, 2.75), facecolor="white")
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        strip = torch.nn.functional.pad(images[:SHOWN, 0], (0, 1), value=-1)
        axis.imshow(torch.cat(list(strip), dim=1).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        accent = LIGHT.accent if label.startswith("planned") else LIGHT.text
        axis.text(-0.01, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=8.5, color=accent)
    figure.subplots_adjust(left=0.19, right=0.995, top=0.985, bottom=0.015, hspace=0.05)
    figure.savefig(path, dpi=130)


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
    draw_samples(HERE / "samples.png")
