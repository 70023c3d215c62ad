"""What came out of the comparison with peers: peers.json, the same as a Markdown table, and one plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from lazy_compile.bench.peer_task import System
from lazy_compile.bench.peers import SYSTEMS, PeerSettings, measure, versions
from lazy_compile.bench.tasks.registry import SUBJECTS
from lazy_compile.errors import ConfigError
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.reporting.figures import LIGHT, Draw, Theme, _figure, _style
from lazy_compile.storage import atomic_path, load_json, save_json

Row = Mapping[str, Any]

COLUMNS = ("system", "package", "MACs", "RMSE to dense", "±", "median image", "time", "batch", "setting")

TASKS: dict[str, dict[str, Any]] = {
    "digits": {},
    "scenes": {"search_samples": 16, "timed_samples": 8},
    "emoji": {
        "search_samples": 2, "samples": 16, "timed_samples": 1, "paired": 1, "plan_samples": 4, "plan_calls": 200,
        "most_settings": 20,
    },
}  # fmt: skip
"""A larger model gets fewer images to choose settings and plans on, and to be timed with."""


def measure_peers(
    wanted: str,
    steps: Sequence[int],
    changes: Mapping[str, Any],
    output: Path,
    on_progress: OnProgress = no_progress,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure one model or all of them, and write ``peers.json``, ``peers.md`` and ``peers.png``.

    What these say of other models, systems and numbers of steps stays. Rows, plans and settings are kept in a folder
    ``peers`` beside them as soon as they are there: a run that was stopped goes on where it was.

    Args:
        wanted: a model, or ``"all"``.
        steps: denoising steps T, several to do one after the other.
        changes: fields of :class:`~lazy_compile.bench.peers.PeerSettings` that differ from the usual ones.
        output: the folder to write to.
        on_progress: see :mod:`lazy_compile.progress`.
        names: of the systems to measure; by default all.

    Raises:
        ConfigError: there is no such model, or no such system.
    """
    systems = _systems(names)
    if wanted != "all" and wanted not in SUBJECTS:
        raise ConfigError(f"there is no model {wanted!r} to measure; expected all or one of {', '.join(SUBJECTS)}")
    path = output / "peers.json"
    found: dict[str, Any] = load_json(path) if path.exists() else {"rows": [], "failures": []}
    for count in steps:
        for name in SUBJECTS if wanted == "all" else [wanted]:
            settings = PeerSettings(**{"steps": count, **TASKS[name], **changes})
            for system, rows, error in measure(
                name, settings, output / "peers", systems=systems, on_progress=on_progress
            ):
                own = {"model": name, "steps": count, "system": system.name, "package": system.package}
                fresh = {
                    "rows": [{**own, **asdict(row), "images": settings.samples} for row in rows],
                    "failures": [{**own, "error": error}] if error else [],
                }
                for part, added in fresh.items():
                    others = [row for row in found[part] if not own.items() <= row.items()]
                    found[part] = sorted(others + added, key=lambda row: (row["model"], row["steps"]))
                found["versions"] = versions("torch", "diffusers", "cache-dit")
                write(found, output)
    return found


def _systems(names: Sequence[str] | None) -> list[System]:
    known = {system.name: system for system in SYSTEMS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"there is no system {name!r} to measure; expected one of {', '.join(known)}")
    return [known[name] for name in names or known]


def write(found: Mapping[str, Any], output: Path) -> None:
    save_json(output / "peers.json", found)
    with atomic_path(output / "peers.md") as temporary:
        temporary.write_text(markdown(found), encoding="utf-8")
    with atomic_path(output / "peers.png") as temporary:
        fronts(found["rows"])(LIGHT).savefig(temporary, format="png", dpi=160)


# Tables ----------------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """One row as text, in the order of :data:`COLUMNS`."""
    spread = (max(row["sets"]) - min(row["sets"])) / 2
    setting = ", ".join(f"{name} {value}" for name, value in _shown(row["setting"]))
    return [
        row["system"], row["package"], f"{row['compute']:.1%}", f"{row['rmse']:.4f}", f"{spread:.4f}",
        f"{row['median']:.4f}", "" if row["time"] is None else f"{row['time']:.2f}",
        "" if row["batch"] is None else f"{row['batch']:.0e}", setting,
    ]  # fmt: skip


def _shown(setting: str) -> Iterator[tuple[str, Any]]:
    for name, value in json.loads(setting).items():
        yield name.replace("_", " "), value


def best(rows: Sequence[Row]) -> list[Row]:
    """Of each system, model, number of steps and budget the row of least error, ordered by it."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["rmse"]):
        found.setdefault((row["model"], row["steps"], row["budget"], row["system"]), row)
    return list(found.values())


def contests(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """For each model, number of steps and budget the best row of this package, and of all peers."""
    groups = {(row["model"], row["steps"], -row["budget"]) for row in rows}
    for model, steps, budget in sorted(groups):
        mine = [row for row in best(rows) if (row["model"], row["steps"], row["budget"]) == (model, steps, -budget)]
        ours = [row for row in mine if row["package"] == "lazy_compile"]
        peers = [row for row in mine if row["package"] != "lazy_compile"]
        if ours and peers:
            yield ours[0], peers[0]


def markdown(found: Mapping[str, Any]) -> str:
    """Who is ahead, then all systems of each model and number of steps, then what failed."""
    rows = best(found["rows"])
    parts = [ABOUT, _line(CONTEST), _line("---" for _ in CONTEST)]
    for ours, peer in contests(rows):
        ratio = ours["rmse"] / peer["rmse"]
        parts.append(
            _line(
                [ours["model"], ours["steps"], f"{ours['budget']:.0%}", *_brief(ours), *_brief(peer),
                 f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"]
            )
        )  # fmt: skip
    for model, steps in dict.fromkeys((row["model"], row["steps"]) for row in found["rows"]):
        mine = [row for row in rows if (row["model"], row["steps"]) == (model, steps)]
        judged = sorted({f"{len(row['sets'])} sets of {row['images']} images" for row in mine})
        parts += ["", f"## {model}, {steps} steps", "", f"Judged on {' or '.join(judged)}.", ""]
        parts += [_line(COLUMNS), _line("---" for _ in COLUMNS)]
        for row in sorted(mine, key=lambda row: (-row["budget"], row["rmse"])):
            name, *others = cells(row)
            parts.append(_line([f"**{name}**" if row["package"] == "lazy_compile" else name, *others]))
        failed = [each for each in found["failures"] if (each["model"], each["steps"]) == (model, steps)]
        parts += ["", *(f"- {each['system']} ({each['package']}): {each['error']}" for each in failed)]
    return "\n".join(parts) + "\n"


def _brief(row: Row) -> list[str]:
    return [f"{row['rmse']:.4f} ({row['system']})", f"{row['compute']:.1%}"]


def peers_table(found: Mapping[str, Any]) -> Table:
    table = Table("model", "T", *COLUMNS[:-1], box=None)
    for row in sorted(best(found["rows"]), key=lambda row: (row["model"], row["steps"], -row["budget"], row["rmse"])):
        style = "bold" if row["package"] == "lazy_compile" else None
        table.add_row(row["model"], str(row["steps"]), *cells(row)[:-1], style=style)
    for each in found["failures"]:
        table.add_row(each["model"], str(each["steps"]), each["system"], each["package"], each["error"])
    return table


CONTEST = ("model", "T", "MACs", "best of ours", "MACs spent", "best peer", "MACs spent", "ours over peer's")

ABOUT = """# Against the peers' own packages

Written by `make peers`; the rows stand in [peers.json](peers.json).

![Error over MACs and over time, one line a system](peers.png)

Every system runs on the same models, from the same noise, and is held against the dense samples of the same number of
steps. Settings are swept, and plans made, on noise of their own; what is shown was judged on other sets of images, as
many as each table says. MACs are the matrix products, attention and convolutions that really ran, counted as they were
dispatched. Peers may spend 1.5 points more than the budget, plans no more than as many whole steps as that pays for.
*Time* is that of a trajectory over the dense one's, on one thread, in turn; *batch* the largest difference of a sample
in a batch of 8 from the same one alone.

## Who is ahead
"""


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


# The plot --------------------------------------------------------------------------------------------------------


def fronts(rows: Sequence[Row]) -> Draw:
    """RMSE over MACs and over time, a pair of panels for each model and number of steps, a line for each system."""
    shown = best(rows)
    groups = list(dict.fromkeys((row["model"], row["steps"]) for row in shown))
    names = sorted({row["system"] for row in shown})

    def draw(theme: Theme) -> Any:
        figure = _figure(height=3.6 * max(len(groups), 1))
        panels = figure.subplots(max(len(groups), 1), 2, squeeze=False, sharey="row")
        for (model, steps), pair in zip(groups, panels, strict=False):
            for axis, key in zip(pair, ("compute", "time"), strict=True):
                for place, name in enumerate(names):
                    mine = [row for row in shown if (row["model"], row["steps"], row["system"]) == (model, steps, name)]
                    _draw_line(axis, theme, mine, key, name, place)
                if not any(len(line.get_xdata()) for line in axis.lines):
                    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=theme.text)
                axis.set_yscale("log")
                axis.set_title(f"{model}, {steps} steps", fontsize=11, color=theme.text, loc="left")
                axis.set_xlabel(
                    {"compute": "MACs, share of the dense model's", "time": "time, share of the dense"}[key]
                )
                _style(axis, theme)
            pair[0].set_ylabel("RMSE to the dense samples")
        if groups:
            handles, labels = panels[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=theme.text, fontsize=8)
        return figure

    return draw


def _draw_line(axis: Any, theme: Theme, rows: Sequence[Row], key: str, name: str, place: int) -> None:
    points = sorted((row[key], row["rmse"]) for row in rows if row[key] is not None)
    ours = bool(rows) and rows[0]["package"] == "lazy_compile"
    marker = "osD^v<>pXP*"[place % 11]
    axis.plot(
        [x for x, _ in points], [y for _, y in points], marker=marker, label=name, markersize=6 if ours else 4,
        linewidth=2.0 if ours else 0.8, color=theme.accent if name == "plan" else None,
    )  # fmt: skip
