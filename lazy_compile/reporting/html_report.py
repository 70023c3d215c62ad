"""A page that needs nothing but itself: what was measured, what came out, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazy_compile.errors import ArtifactError, shown
from lazy_compile.reporting.figures import LABELS, gate_biases, picture, pixels, quality_against_compute, reuse_maps
from lazy_compile.reporting.markup import Markup, join, render
from lazy_compile.reporting.samples import load_samples
from lazy_compile.runtime.artifact import MANIFEST, read
from lazy_compile.storage import atomic_path, load_sealed_json

SUMMARY = "summary.json"
SAMPLES = "samples.npz"
"""Beside a summary, for the pictures of a report: ``images_<row>``, ``reuse_<row>``, ``reference`` and ``branches``;
``picture_<row>`` for the rows of its ``pictures``."""

_ROW = ("method", "sampler_steps", "lazy_ratio", "compute_ratio", "rmse_dense", "rmse_reference", "frechet", "seeds")
_ONNX = ("branches", "if_nodes", "heavy_ops_outside_if", "max_abs_error")
_TOP = ("model", "steps", "rows", "decisions_varying_between_samples", "onnx")


def write_report(source: str | Path, output: str | Path) -> Path:
    """Write an HTML page about a ``summary.json``, or about the gates or schedule in a folder.

    Raises:
        ArtifactError: the source is missing or not of one of these forms.
    """
    source, output = Path(source), Path(output)
    if source.is_dir() and (source / SUMMARY).exists():
        source = source / SUMMARY
    if source.is_dir() or source.name == MANIFEST:
        page = artifact_page(source.parent if source.name == MANIFEST else source)
    else:
        page = summary_page(load_sealed_json(source), source)
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output


def summary_page(summary: Any, source: Path) -> str:
    """The page of a comparison; its pictures come from :data:`SAMPLES` beside ``source``, where that exists."""
    _check_summary(summary, source)
    try:
        return _summary_page(summary, source)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{source} is damaged ({shown(error)}); make it again") from error


def _summary_page(summary: Any, source: Path) -> str:
    rows = summary["rows"]
    arrays = load_samples(source.with_name(SAMPLES))
    parts = [
        render(
            "<p class=lead>{{ model }}, {{ steps }} denoising steps. Every method starts from the same noise; a lazy "
            "model computes a branch, or reuses what it produced at an earlier step.</p>",
            model=summary["model"], steps=summary["steps"],
        ),
        _pictures(summary.get("pictures"), arrays),
        _tiles(summary),
        _section("Quality against compute", picture(quality_against_compute(rows), "quality against compute"),
                 "Lower is better. Bars: one standard deviation over the sets of noise."),
    ]  # fmt: skip
    if arrays:
        parts.append(_section("Samples from the same noise", _samples(rows, arrays)))
        maps = {
            f"{row['lazy_ratio']:.0%} reused, {row['compute_ratio']:.0%} of the MACs": arrays[f"reuse_{position}"]
            for position, row in enumerate(rows)
            if row["method"] == "lazy" and f"reuse_{position}" in arrays
        }
        if maps:
            drawn = picture(reuse_maps(maps, [str(name) for name in arrays["branches"]]), "reuse per branch and step")
            varying = f"{summary['decisions_varying_between_samples']:.1%} of the decisions differ between samples."
            parts.append(_section("What is reused", drawn, f"By branch and step, under the lazy gates. {varying}"))
    parts.append(_section("All figures", _table(rows)))
    parts.append(_section("How it was measured", _method(summary)))
    return _page("Lazy against dense", parts)


def artifact_page(directory: Path) -> str:
    """The page of a folder that calibrate, plan or ``save()`` wrote."""
    artifact = read(directory)
    names = [name for name, _, _ in artifact.branches]
    policy = artifact.policy
    parts = [
        render(
            "<p class=lead>{{ folder }}: {{ count }} branches, policy <b>{{ policy }}</b>, captured by "
            "{{ capture }}.</p>",
            folder=directory,
            count=len(names),
            policy=type(policy).__name__,
            capture=artifact.capture,
        )
    ]
    if (table := policy.gate_table) is not None:
        drawn = picture(gate_biases(table.bias.double().numpy(), table.knots.numpy(), names), "gate biases")
        note = "The bias of each gate over the trajectory, before it reads its input: left is the noisy end."
        parts.append(_section("What the gates lean to", drawn, note))
    elif (steps := policy.step_table(len(names))) is not None and steps.schedule.lazy_ratio:
        reuse = (~steps.schedule.should_compute).astype(np.float64)
        drawn = picture(reuse_maps({f"{steps.schedule.lazy_ratio:.0%} reused": reuse}, names), "schedule")
        parts.append(_section("The schedule", drawn))
    cells = [[name, kind, str(size)] for name, kind, size in artifact.branches]
    parts.append(_section("Branches", _cells(["branch", "kind", "gate features"], cells)))
    return _page("A lazy model", parts)


def _tiles(summary: Mapping[str, Any]) -> Markup:
    """The lazy rows in a few words, each beside fewer steps at no less compute."""
    tiles = []
    for row in summary["rows"]:
        if row["method"] == "lazy":
            note = f"{row['lazy_ratio']:.0%} of the branch evaluations reused."
            rivals = [r for r in summary["rows"] if r["method"] == "ddim" and r.get("target") == row.get("target")]
            if rivals and rivals[0]["rmse_reference"]:
                change = row["rmse_reference"] / rivals[0]["rmse_reference"] - 1
                rival = f"{'lower' if change < 0 else 'higher'} than with {rivals[0]['sampler_steps']} dense steps"
                note += f" RMSE to the reference {abs(change):.0%} {rival}."
            tiles.append((f"{row['compute_ratio']:.0%} of the MACs", note))
    onnx = summary["onnx"]
    note = f"for {onnx['branches']} branches, {onnx['heavy_ops_outside_if']} heavy operators outside them."
    tiles.append(
        (f"{onnx['if_nodes']} ONNX If nodes", f"{note} ONNX Runtime within {onnx['max_abs_error']:.1e} of PyTorch.")
    )
    return render(
        "<div class=tiles>{% for a, b in tiles %}<div><b>{{ a }}</b><span>{{ b }}</span></div>{% endfor %}</div>",
        tiles=tiles,
    )


def _pictures(pictures: Mapping[str, Any] | None, arrays: Mapping[str, Any]) -> Markup:
    """Images with captions, a strip a method, for whoever looks before reading figures."""
    if not pictures:
        return Markup("")
    drawn = [
        _strip(
            LABELS.get(row["method"], row["method"]),
            f"{row['steps']} steps, {row['compute_ratio']:.0%} of the MACs, RMSE to dense {row['rmse_dense']:.4f}",
            arrays[f"picture_{position}"], ours=row["method"] == "planned",
        )
        for position, row in enumerate(pictures["rows"])
        if f"picture_{position}" in arrays
    ]  # fmt: skip
    below = render(
        "<figure><figcaption></figcaption><div class=captions>{% for caption in captions %}<span>{{ caption }}</span>"
        "{% endfor %}</div></figure>",
        captions=pictures["captions"],
    )
    note = "Captions are evenly spread over the sorted list; all strips start from the same noise."
    return _section(f"{pictures['model']}, text to image", join([*drawn, below]), note)


def _samples(rows: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any]) -> Markup:
    """One strip a method, under a heading for each target."""
    groups: dict[str, list[Markup]] = {"Independent of a target": []}
    if "reference" in arrays:
        groups["Independent of a target"].append(_strip("reference", "many dense steps", arrays["reference"]))
    for position, row in enumerate(rows):
        if f"images_{position}" in arrays:
            target = row.get("target")
            heading = "Independent of a target" if target is None else f"Gates calibrated to reuse {target:.0%}"
            detail = f"{row['sampler_steps']} steps, {row['compute_ratio']:.0%} of the MACs"
            strip = _strip(LABELS.get(row["method"], row["method"]), detail, arrays[f"images_{position}"])
            groups.setdefault(heading, []).append(strip)
    return join(
        render("<h3>{{ heading }}</h3>{{ strips }}", heading=heading, strips=join(strips))
        for heading, strips in groups.items()
    )


def _strip(name: str, detail: str, images: Any, ours: bool = False) -> Markup:
    return render(
        "<figure{{ mark }}><figcaption><b>{{ name }}</b><span>{{ detail }}</span></figcaption>"
        '<img class=strip src="{{ source }}" alt="samples: {{ name }}"></figure>',
        mark=Markup(" class=ours") if ours or name == LABELS["lazy"] else "", name=name, detail=detail,
        source=pixels(images[:16]),
    )  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    scores = {"rmse_dense": "RMSE to dense", "rmse_reference": "RMSE to reference", "frechet": "Fréchet"}
    if all("frechet_scans" in row for row in rows):
        scores["frechet_scans"] = "to scans"
    head = ["method", "steps", "reused", "MACs", *scores.values()]
    cells = [
        [
            LABELS.get(row["method"], row["method"]), str(row["sampler_steps"]), f"{row['lazy_ratio']:.1%}",
            f"{row['compute_ratio']:.1%}", *(_spread(row, key) for key in scores),
        ]
        for row in rows
    ]  # fmt: skip
    return _cells(head, cells, ours=[row["method"] == "lazy" for row in rows])


def _cells(head: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[bool] = ()) -> Markup:
    marked = [(position < len(ours) and ours[position], row) for position, row in enumerate(rows)]
    return render(
        "<div class=wide><table><thead><tr>{% for cell in head %}<th>{{ cell }}{% endfor %}<tbody>"
        "{% for mine, row in rows %}<tr{% if mine %} class=ours{% endif %}>"
        "{% for cell in row %}<td>{{ cell }}{% endfor %}{% endfor %}</table></div>",
        head=head, rows=marked,
    )  # fmt: skip


def _spread(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.4f}" + (f" ±{row[f'{key}_std']:.4f}" if f"{key}_std" in row else "")


def _method(summary: Mapping[str, Any]) -> Markup:
    seeds = max(row["seeds"] for row in summary["rows"])
    return render(
        "<ul>"
        "<li>Mean and standard deviation over {{ seeds }} sets of noise; a set is the same for every method.</li>"
        "<li><b>Reused</b>: share of all branch evaluations that were answered from the cache, samples counted singly. "
        "<b>MACs</b>: multiply-accumulates spent over those of the dense model at the same number of steps, always-on "
        "parts included.</li>"
        "<li><b>RMSE to dense</b>: against the dense samples at {{ steps }} steps. <b>RMSE to reference</b>: "
        "against many dense steps, which stand for the exact solution. Pixels lie in -1 to 1.</li>"
        "<li><b>Fréchet</b>: distance between Gaussians fitted to the features of a small digits classifier, on "
        "samples and on the reference samples of the same noise; <b>to scans</b>: on samples and on all real scans. "
        "Neither is FID. The distance to scans is mostly the model's own error: it hardly tells step counts apart.</li>"
        "<li><b>Fewer steps</b> always gets at least the compute of the lazy model that it is compared with. <b>Every "
        "2nd step</b> and the random and planned schedules reuse with the same linear extrapolation as the lazy gates; "
        "<i>repeated</i> returns the last output unchanged.</li>"
        "<li>ONNX: one trajectory in ONNX Runtime against PyTorch under one decision per call; largest difference of "
        "the samples {{ error }}.</li></ul>",
        seeds=seeds, steps=summary["steps"], error=f"{summary['onnx']['max_abs_error']:.1e}",
    )  # fmt: skip


def _require(values: Any, keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise ArtifactError(f"{where} lacks {missing[0]!r}; expected a summary.json as the demo writes it")


def _check_summary(summary: Any, source: Path) -> None:
    """
    Raises:
        ArtifactError: something is missing, or a score is no finite number.
    """
    _require(summary, _TOP, str(source))
    if not isinstance(summary["rows"], list) or not isinstance(summary["model"], str):
        raise ArtifactError(f"{source} is damaged: expected a model and a list of rows; make it again")
    for position, row in enumerate(summary["rows"]):
        _require(row, _ROW, f"{source}: rows[{position}]")
        for key, value in row.items():
            text = key in ("method", "label")
            if (not isinstance(value, str)) if text else not _is_number(value):
                raise ArtifactError(f"{source}: rows[{position}].{shown(key)} is {shown(value)}; make it again")
    _require(summary["onnx"], _ONNX, f"{source}: onnx")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _section(title: str, body: Markup, note: str = "") -> Markup:
    return render(
        "<section><h2>{{ title }}</h2>{{ body }}{% if note %}<p class=note>{{ note }}</p>{% endif %}</section>",
        title=title, body=body, note=note,
    )  # fmt: skip


def _page(title: str, parts: Sequence[Markup]) -> str:
    return str(render(_TEMPLATE, title=title, body=Markup("\n").join(parts)))


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; --page: #fcfcfd; --card: #fff; --text: #22262e; --soft: #646b78; --line: #e3e5ea;
  --accent: #c2410c; --tint: #fff3ea; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --card: #1c1f25; --text: #dfe3ea; --soft: #98a0ae;
  --line: #30353f; --accent: #fb923c; --tint: #2c2118; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.02em; }
h2 { font-size: 19px; margin: 0 0 14px; }
h3 { font-size: 13px; font-weight: 500; color: var(--soft); margin: 14px 8px 4px; }
.lead { color: var(--soft); max-width: 70ch; margin: 0 0 28px; }
.note { color: var(--soft); font-size: 14px; margin: 12px 0 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin-top: 20px; }
section img { max-width: 100%; display: block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.tiles b { display: block; font-size: 24px; letter-spacing: -.01em; color: var(--accent); }
.tiles span { color: var(--soft); font-size: 14px; }
figure { display: grid; grid-template-columns: 190px 1fr; gap: 16px; align-items: center; margin: 0; padding: 5px 8px;
  border-radius: 8px; }
figcaption b { display: block; font-size: 14px; line-height: 1.3; }
figcaption span { color: var(--soft); font-size: 12px; }
.strip { width: 100%; image-rendering: pixelated; }
.captions { display: flex; }
.captions span { flex: 1 1 0; padding-right: 6px; color: var(--soft); font-size: 12px; line-height: 1.3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
th, td { padding: 7px 10px; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
.ours { background: var(--tint); }
tr.ours td:first-child { color: var(--accent); font-weight: 600; }
ul { margin: 0; padding-left: 20px; font-size: 15px; }
li { margin: 6px 0; }
</style></head><body><main><h1>{{ title }}</h1>
{{ body }}
</main></body></html>
"""
