"""The answers as a page: questions.json, questions.md, and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazy_compile.bench.ablations import Questions, QuestionSettings
from lazy_compile.bench.tasks.registry import digits_subject
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.reporting.figures import LIGHT, Draw, Theme, _figure, _style
from lazy_compile.storage import atomic_path, load_json, save_json

PICTURES = "questions"


def ask_all(
    output: Path, settings: QuestionSettings | None = None, on_progress: OnProgress = no_progress
) -> dict[str, Any]:
    """Ask everything of the digits model, and write the page to the folder ``output``.

    Answers are kept in ``questions/answers.json`` as soon as they are there: a run that was stopped goes on.
    """
    settings = settings or QuestionSettings()
    answers = Questions(digits_subject(), settings, on_progress, output / PICTURES / "answers.json").answers()
    save_json(output / "questions.json", answers)
    (output / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, draw in pictures(answers).items():
        with atomic_path(output / PICTURES / f"{name}.png") as temporary:
            draw(LIGHT).savefig(temporary, format="png", dpi=110)
    quality = output / "quality.json"
    rows = load_json(quality)["rows"] if quality.exists() else []
    with atomic_path(output / "questions.md") as temporary:
        temporary.write_text(page(answers, rows, settings), encoding="utf-8")
    return answers


def page(answers: Mapping[str, Any], quality: Sequence[Mapping[str, Any]], settings: QuestionSettings) -> str:
    """The page as Markdown; the oracle and the frozen gates come from the rows of the quality bench."""
    reused = 1 - np.array(answers["schedule"])
    stages = np.array_split(reused, 3)
    oracle = [row for row in quality if row["family"] == "oracle"]
    seconds = answers["seconds"]
    parts = [
        HEAD.format(steps=settings.steps, sets=settings.seeds, images=settings.samples),
        "## Which threshold?\n\n" + WHY["thresholds"],
        _picture("thresholds", "error and compute over the threshold"),
        _table(answers["thresholds"], {"threshold": ".2f", "compute_ratio": ".1%", "reused": ".1%", "rmse": ".4f"}),
        "## Attention alone, MLPs alone?\n\nEvery n-th step computes, with linear reuse in between.",
        _table(answers["kinds"], {"n": "d", "lazy": "", "compute_ratio": ".1%", "reused": ".1%", "rmse": ".4f"}),
        "## Which layers, which stage?\n\n" + WHY["stages"],
        _picture("schedule", "which branch reuses at which step"),
        _table(
            [
                {
                    "branch": name,
                    **{stage: float(part[:, place].mean()) for stage, part in zip(STAGES, stages, strict=True)},
                }
                for place, name in enumerate(answers["branches"])
            ],
            {"branch": "", **dict.fromkeys(STAGES, ".0%")},
        ),
        "## Do samples differ, and can a gate tell?\n\n" + WHY["worth"],
        _table(answers["worth"], {"components": "d", "samples": "d", "variation": ".1f", "r2": ".3f"}),
        "Decisions of trained gates, and the table that most samples would agree on:",
        _table(answers["frozen"], {"decisions": "", "varying": ".1%", "compute_ratio": ".1%", "rmse": ".4f"}),
        "## Do trained gates beat the plan that they start from?\n\n" + WHY["gates"],
        _table(
            answers["gates"],
            {
                "budget": ".0%",
                "seed": "d",
                "ratio_planned": ".1%",
                "rmse_planned": ".4f",
                "ratio_trained": ".1%",
                "rmse_trained": ".4f",
                "kept": "",
            },
        ),
        "## What could be won?\n\n" + WHY["oracle"],
        _table(
            oracle,
            {
                "model": "",
                "budget": ".0%",
                "method": "",
                "compute_ratio": ".1%",
                "rmse_dense": ".4f",
                "median_dense": ".4f",
            },
        ),
        "## Fewer steps, or lazy ones?\n\n" + WHY["steps"],
        _picture("steps", "lazy trajectories against fewer steps"),
        _table(
            [{**row, "rmse_fewer": f"{row['rmse_fewer']:.4f}" if _is_fewer(row) else ""} for row in answers["steps"]],
            {
                "steps": "d",
                "lazy_ratio": ".1%",
                "compute_ratio": ".1%",
                "rmse": ".4f",
                "fewer": "d",
                "rmse_fewer": "",
            },
        ),
        "## One calibration for several numbers of steps?\n\n" + WHY["transfers"],
        _table(
            answers["transfers"],
            {
                "steps": "d",
                "ratio_own": ".1%",
                "rmse_own": ".4f",
                "ratio_joined": ".1%",
                "rmse_joined": ".4f",
                "ratio_moved": ".1%",
                "rmse_moved": ".4f",
            },
        ),
        f"## What does it cost?\n\nOn one core: planning {seconds['planning']:.0f} s, training gates "
        f"{seconds['training gates']:.0f} s of processor time, with {settings.batch} images a trajectory.",
    ]
    return "\n\n".join(parts) + "\n"


STAGES = ("first third", "second third", "last third")

HEAD = """# Questions

Written by `make results` (`lazy-compile bench questions`), in [numbers](questions.json) too. The digits model,
DDIM, guidance 1.5, T = {steps} unless another is named; RMSE to the dense samples of as many steps, {sets} sets of
{images} images, none of which any schedule or gate was made from. Slopes are fitted where nothing else is said."""

WHY = {
    "thresholds": """The paper reuses where `sigmoid(-compute_logit) > 0.5`. Gates trained for half the compute, at
other thresholds: a quality dial at run time, `Learned(table, shift=log(threshold / (1 - threshold)))`.""",
    "stages": """The plan at half the compute; dark reuses. Share of steps that reuse:""",
    "worth": """For every decision of that plan, what turning it over would change in the error of a sample, to
first order: how far it varies between samples (standard deviation over mean, averaged over decisions), and how much
of that variation (R2, on samples that were left out) a linear function of the leading components of the gate's
input predicts. At or below zero, the mean over samples is the better guess, and a gate has nothing to learn.""",
    "gates": """Plans and gates that `calibrate` trains from each, at its usual settings, on noise
that neither has seen; *kept* is what `calibrate` decided for, on noise of its own. [All that is known of
gates](gates.md).""",
    "oracle": """An oracle that knows the first-order answer of every single sample searches a schedule for each,
within the same budget. Both rows of a pair are of the same few images.""",
    "steps": """A plan of T steps against the dense sampler with the number of steps that costs no less; both
against the dense samples of T steps, from the same noise. Where that number is T there is nothing to compare.""",
    "transfers": """A plan made for each T; one table of gates that joins them
(`lazy-compile calibrate --steps 12 --steps 20 --steps 30`), in which each trajectory finds its own rows; and gates on
knots over the noise level, from the plan for one T alone, shifted to the compute of each plan. What reuses at every
second step here does not there, whatever the noise level, and so a table made for one T is no plan for another.""",
}


def pictures(answers: Mapping[str, Any]) -> dict[str, Draw]:
    return {
        "thresholds": lambda theme: _thresholds(answers["thresholds"], theme),
        "schedule": lambda theme: _schedule(answers, theme),
        "steps": lambda theme: _steps(answers["steps"], theme),
    }


def _thresholds(rows: Sequence[Mapping[str, float]], theme: Theme) -> Any:
    figure = _figure(height=3.2)
    left, right = figure.subplots(1, 2)
    for axis, name, title in ((left, "compute_ratio", "MACs spent"), (right, "rmse", "RMSE to dense")):
        axis.plot([row["threshold"] for row in rows], [row[name] for row in rows], marker=".", color=theme.accent)
        axis.set_title(title, fontsize=11, loc="left", color=theme.text)
        axis.set_xlabel("threshold")
        _style(axis, theme)
    return figure


def _schedule(answers: Mapping[str, Any], theme: Theme) -> Any:
    figure = _figure(height=3.6)
    axis = figure.subplots()
    axis.imshow(1 - np.array(answers["schedule"]).T, aspect="auto", cmap="Oranges", vmin=0, vmax=1.3)
    axis.set_yticks(range(len(answers["branches"])), answers["branches"], fontsize=7)
    axis.set_xlabel("step")
    axis.set_xticks(range(0, len(answers["schedule"]), 5))
    _style(axis, theme)
    axis.grid(visible=False)
    return figure


def _steps(rows: Sequence[Mapping[str, float]], theme: Theme) -> Any:
    figure = _figure(height=3.6)
    axis = figure.subplots()
    for place, steps in enumerate(dict.fromkeys(row["steps"] for row in rows)):
        mine = [row for row in rows if row["steps"] == steps]
        compute = [row["compute_ratio"] for row in mine]
        axis.plot(compute, [row["rmse"] for row in mine], marker="o", color=f"C{place}", label=f"lazy, T = {steps}")
        fewer = [row["rmse_fewer"] if _is_fewer(row) else np.nan for row in mine]
        axis.plot(compute, fewer, marker="x", color=f"C{place}", linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("MACs spent; dotted: fewer dense steps")
    axis.set_title("RMSE to the dense samples of T steps", fontsize=11, loc="left", color=theme.text)
    _style(axis, theme)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=theme.text, fontsize=8)
    return figure


def _is_fewer(row: Mapping[str, float]) -> bool:
    """Of few steps the number that costs no less may be all of them, which are the dense samples."""
    return row["fewer"] < row["steps"]


def _picture(name: str, alt: str) -> str:
    return f"![{alt}]({PICTURES}/{name}.png)"


def _table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    lines = [[TITLES.get(name, name) for name in columns], ["---"] * len(columns)]
    lines += [[format(row[name], form) for name, form in columns.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TITLES = {
    "compute_ratio": "MACs",
    "rmse": "RMSE",
    "r2": "R2",
    "lazy_ratio": "reused",
    "steps": "T",
    "fewer": "dense steps",
    "rmse_fewer": "their RMSE",
    "ratio_own": "MACs, own plan",
    "rmse_own": "RMSE, own plan",
    "ratio_joined": "MACs, joined",
    "rmse_joined": "RMSE, joined",
    "ratio_moved": "MACs, from one T",
    "rmse_moved": "RMSE, from one T",
    "rmse_dense": "RMSE",
    "median_dense": "median image",
    "ratio_planned": "MACs, plan",
    "rmse_planned": "RMSE, plan",
    "ratio_trained": "MACs, gates",
    "rmse_trained": "RMSE, gates",
    "varying": "differ between samples",
}
