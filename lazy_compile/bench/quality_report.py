"""What came out of the comparison: quality.json, the same as a Markdown table, and as a page with the Pareto front."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lazy_compile.bench.quality import QualitySettings, measure
from lazy_compile.bench.tasks.registry import SUBJECTS
from lazy_compile.errors import ConfigError
from lazy_compile.planning.search import SearchOptions
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.reporting.figures import Draw, Theme, _figure, _style, picture
from lazy_compile.storage import atomic_path, load_json, save_json

COLUMNS = {
    "method": "method", "reuse_arm": "reuse", "steps": "steps", "compute_ratio": "MACs", "rmse_dense": "RMSE to dense",
    "spread": "±", "median_dense": "median image", "rmse_reference": "RMSE to reference", "frechet": "Fréchet",
    "accuracy": "read right",
}  # fmt: skip


SETTINGS = {
    "digits": QualitySettings(),
    "scenes": QualitySettings(
        samples=32, calibration_batch=48, gate_batch=3, oracle_samples=6, search=SearchOptions(rounds=4)
    ),
    "emoji": QualitySettings(
        sampling_seeds=2,
        calibration_seeds=1,
        samples=8,
        calibration_batch=4,
        plan_calls=200,
        threshold_batch=2,
        learned=False,
        reference_steps=50,
    ),
}
"""What is measured of each subject unless told otherwise: a larger model gets fewer images, and no gates."""


def measure_all(
    wanted: str, changes: Mapping[str, Any], output: Path, on_progress: OnProgress = no_progress
) -> list[dict[str, Any]]:
    """Measure one subject or all of them, and write ``quality.json``, ``quality.md`` and ``quality.html``.

    What these say of other subjects stays; they are written after each subject. Rows and searches are kept in a folder
    ``quality`` beside them as soon as they are there: a run that was stopped goes on where it was.

    Args:
        wanted: a subject, or ``"all"``.
        changes: fields of the settings, where they are to differ from :data:`SETTINGS`.
        output: the folder to write to.
        on_progress: see :mod:`lazy_compile.progress`.

    Raises:
        ConfigError: there is no such subject.
    """
    if wanted != "all" and wanted not in SUBJECTS:
        raise ConfigError(f"there is no model {wanted!r} to measure; expected all or one of {', '.join(SUBJECTS)}")
    path = output / "quality.json"
    rows: list[dict[str, Any]] = load_json(path).get("rows", []) if path.exists() else []
    for name in SUBJECTS if wanted == "all" else [wanted]:
        subject = SUBJECTS[name]()
        fresh = measure(subject, replace(SETTINGS[name], **changes), output / "quality" / name, on_progress)
        rows = sorted([row for row in rows if row["model"] != subject.name] + fresh, key=lambda row: row["model"])
        save_json(path, {"rows": rows})
        for file, text in (("quality.md", markdown(rows)), ("quality.html", page(rows))):
            with atomic_path(output / file) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return rows


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row as text, in the order of :data:`COLUMNS`."""
    shares = {name: f"{row[name]:.1%}" for name in ("compute_ratio", "accuracy")}
    numbers = {name: f"{row[name]:.4f}" for name in ("rmse_dense", "spread", "median_dense", "rmse_reference")}
    texts = {**row, **shares, **numbers, "frechet": f"{row['frechet']:.2f}"}
    return [str(texts[name]) for name in COLUMNS]


def quality_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("model", *COLUMNS.values(), box=None)
    for row in rows:
        table.add_row(row["model"], *cells(row), style="bold" if row["family"] == "planned" else None)
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plans and gates against the best simple rule, then all rows of each model, cheapest last."""
    parts = [ABOUT, _line(AGAINST), _line("---" for _ in AGAINST), *map(_line, comparisons(rows)), "", BELOW]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        seeds = sorted({row["seeds"] for row in mine if row["family"] != "oracle"})
        about = f"{mine[0]['sampler']}; {' or '.join(map(str, seeds))} sets of noise and calibrations a row."
        parts += [f"## {model}", "", about, "", _line(COLUMNS.values()), _line("---" for _ in COLUMNS)]
        mine = sorted(mine, key=lambda row: -row["compute_ratio"])
        for row in mine:
            name, *others = cells(row)
            parts.append(_line([f"**{name}**" if row["family"] == "planned" else name, *others]))
        parts.append("")
    return "\n".join(parts)


def comparisons(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """One line for each model, budget and method of ours, in the order of :data:`AGAINST`."""
    for ours in rows:
        if ours["family"] not in ("planned", "learned") or ours["budget"] is None:
            continue
        rules = [row for row in rows if row["model"] == ours["model"] and row["family"] == "baseline"]
        affordable = [best_rule(rules, ours["budget"] + more) for more in (0.01, 0.05)]
        fewer = [
            row for row in rules if row["method"] == "fewer steps" and row["compute_ratio"] >= ours["budget"] - 0.01
        ]
        dense = min(fewer, key=lambda row: row["compute_ratio"])
        ours_text = f"{ours['rmse_dense']:.4f} ± {ours['spread']:.4f} at {ours['compute_ratio']:.1%}"
        between = rules_at(rules, ours["compute_ratio"])
        same = "" if between is None else f"{ours['rmse_dense'] / between:.2f} of {between:.4f}"
        texts = [*(_rule(ours, rule) for rule in affordable), same]
        name = f"**{ours['method']}**" if ours["family"] == "planned" else ours["method"]
        frechet = f"{ours['frechet']:.2f}, {dense['frechet']:.2f}"
        yield [ours["model"], f"{ours['budget']:.0%}", name, ours_text, *texts, frechet]


def best_rule(rules: Sequence[Mapping[str, Any]], budget: float) -> Mapping[str, Any] | None:
    affordable = [row for row in rules if row["compute_ratio"] <= budget]
    return min(affordable, key=lambda row: row["rmse_dense"], default=None)


def rules_at(rules: Sequence[Mapping[str, Any]], compute: float) -> float | None:
    """What the rules would reach at exactly this compute: between the best that spends no more and the next better one.

    RMSE is taken to fall as a power of compute between them. None outside what the rules spend.
    """
    less = best_rule(rules, compute)
    if less is None:
        return None
    better = [row for row in rules if row["compute_ratio"] > compute and row["rmse_dense"] < less["rmse_dense"]]
    if not better:
        return None
    more = min(better, key=lambda row: (row["compute_ratio"], row["rmse_dense"]))
    power = math.log(more["rmse_dense"] / less["rmse_dense"]) / math.log(more["compute_ratio"] / less["compute_ratio"])
    return float(less["rmse_dense"] * (compute / less["compute_ratio"]) ** power)


def _rule(ours: Mapping[str, Any], rule: Mapping[str, Any] | None) -> str:
    if rule is None:
        return ""
    ratio = ours["rmse_dense"] / rule["rmse_dense"]
    name = f"{rule['method']} {rule['reuse_arm']}".strip()
    return f"{ratio:.2f} of {rule['rmse_dense']:.4f} ± {rule['spread']:.4f} ({name}, {rule['compute_ratio']:.1%})"


ABOUT = """# What reuse costs in quality

Written by `make results`; what was learned from it stands in [findings](findings.md), more questions in
[questions](questions.md), the rows in [quality.json](quality.json).

Every method starts from the same noise and is held against the dense samples of the same model. MACs count
everything, the parts that always run included. RMSE is over the numbers of all images, in a range of 2, and the mean
over sets of noise; ± is its spread over sets of noise and calibrations. A few images that diverge
decide it, so the median image stands beside it. The Fréchet distance is taken in the features of a small classifier,
to 100-step samples from the same noise. Rules that decide in whole steps get the next larger amount of compute, never
less.

## Against the best simple rule

"No more compute" allows a rule one point more than the budget, "one step more" five points: a whole step is 5 % of 20.
"The same compute" lies between the best rule that spends no more than we did and the next better one that spends more,
on a line in logarithms. The last column holds our Fréchet distance and that of as many dense steps as the budget pays
for.
"""

BELOW = """The oracle's rows are of few images, and to be compared with each other only.
"""

AGAINST = (
    "model", "MACs", "method", "RMSE to dense", "best rule at no more compute",
    "with one step more", "at the same compute", "Fréchet",
)  # fmt: skip


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One page that needs nothing but itself."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(row))}</tr>" for row in mine)
        head = "".join(f"<th>{html.escape(title)}</th>" for title in COLUMNS.values())
        figure = picture(pareto(mine), f"error against compute, {model}")
        parts.append(f"<h2>{html.escape(model)}</h2>{figure}<table><tr>{head}</tr>{body}</table>")
    return (
        "<!doctype html><meta charset=utf-8><title>Quality against compute</title><style>:root{color-scheme:light dark}"
        "body{font:15px system-ui;max-width:70rem;margin:2rem auto}td,th{padding:.1rem .6rem;text-align:left}</style>"
        + "".join(parts)
    )


def pareto(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """RMSE to the dense samples over MACs, both logarithmic: every method, and the front of the plans."""

    def draw(theme: Theme) -> Any:
        figure = _figure(height=4.4)
        axis = figure.subplots()
        for name, arm in dict.fromkeys((row["method"], row["reuse_arm"]) for row in rows if row["rmse_dense"] > 0):
            mine = sorted(
                (row["compute_ratio"], row["rmse_dense"], row["spread"])
                for row in rows
                if (row["method"], row["reuse_arm"]) == (name, arm)
            )
            x, y, spread = zip(*mine, strict=True)
            ours = name.startswith("plan")
            axis.errorbar(
                x, y, yerr=spread, marker="o" if ours else ".", label=f"{name} {arm}".strip(), capsize=2,
                linewidth=2.2 if ours else 0.8, color=theme.accent if name == "plan" else None,
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("MACs spent, share of the dense model's")
        axis.set_title("RMSE to the dense samples", fontsize=11, color=theme.text, loc="left")
        _style(axis, theme)
        figure.legend(loc="outside right upper", frameon=False, labelcolor=theme.text, fontsize=8)
        return figure

    return draw


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
