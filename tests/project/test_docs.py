"""Pages that quote the code, links between pages, and the code on the pages."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lazy_compile.cli.app import app
from support.doc_setups import doc_setups
from support.doc_snippets import REASONS, Setup, Snippet, pieces_of, run_page

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
HOME = ROOT / "docs" / "index.md"
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])
PAGES = [page for page in [*DOCS, ROOT / "passes" / "README.md"] if "```python" in page.read_text(encoding="utf-8")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URL = PROJECT["urls"]["Homepage"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def texts() -> Iterator[str]:
    """Every string of the package, the values in f-strings as ``{}``."""
    for file in [*(ROOT / "lazy_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def quoted() -> list[str]:
    """The first column of the tables of the page."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def test_every_message_that_is_explained_is_still_said() -> None:
    said = "\n".join(texts())
    assert len(quoted()) > 15
    assert [message for message in quoted() if message not in said] == []


def sources(page: Path) -> list[str]:
    return [piece.source for piece in pieces_of(page.read_text(encoding="utf-8")) if isinstance(piece, Snippet)]


# Code -----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of the hosts
@pytest.mark.parametrize("page", [page for page in PAGES if page != HOME], ids=name_of)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(page, doc_setups(monkeypatch))


def test_the_home_page_shows_the_code_of_the_readme() -> None:
    assert sources(HOME) == sources(README)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_only_what_needs_a_gpu_is_left_out(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    snippets = [piece for piece in pieces_of(text) if isinstance(piece, Snippet)]
    assert len(snippets) == len(re.findall(r"^```python", text, flags=re.MULTILINE)), "a block that is not seen"
    assert {snippet.reason for snippet in snippets} <= {"", *REASONS}


def test_blocks_run_in_order_after_their_setup(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n<!-- setup: two -->\n```python\nresult = [two]\n```\n\n<!-- not run: needs a GPU -->\n"
        "```python\nresult = None\n```\n```python\nresult.append(3)\n```\n"
    )
    assert pieces_of(page.read_text())[:2] == [Setup("two"), Snippet("result = [two]\n", 5)]
    assert run_page(page, {"two": lambda: {"two": 2}})["result"] == [2, 3]


def test_a_failure_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\n\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as failure:
        run_page(page, {})
    assert (failure.traceback[-1].path, failure.traceback[-1].lineno + 1) == (page, 5)


# Commands -------------------------------------------------------------------------------------------------------------


def commands() -> Iterator[Any]:
    """Every ``lazy-compile VERB ...`` that a page shows in a block, by page."""
    for page in DOCS:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:    )?lazy-compile (\w.*)$", text, flags=re.MULTILINE):
            yield pytest.param(line, id=f"{name_of(page)}: {line[:40]}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_on_a_page_has_these_options(line: str) -> None:
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


# Links and numbers ----------------------------------------------------------------------------------------------------


def targets(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in targets(page):
        own = re.match(rf"{re.escape(URL)}/(?:blob|raw)/main/(.*)", target)
        if own:
            assert (ROOT / own[1]).exists(), f"{page.name} links to {target}"
        elif not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_can_be_read_elsewhere() -> None:
    """A package index shows it without the files beside it."""
    assert [target for target in targets(README) if not target.startswith("https://")] == []
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_the_readme_says_what_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    rows = json.loads((ROOT / "docs" / "results" / "quality.json").read_text(encoding="utf-8"))["rows"]
    table = re.findall(r"^\| (digits DiT|scenes MMDiT) \| (\d+)% \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(table) == 3
    for model, macs, cells in table:
        near = [row for row in rows if row["model"] == model and abs(row["compute_ratio"] - int(macs) / 100) < 0.03]
        plan, *_, fewer = cells.split(" | ")
        assert plan in {f"{row['rmse_dense']:.4f}" for row in near if row["method"] == "plan"}
        assert fewer in {f"{row['rmse_dense']:.4f}" for row in near if row["method"] == "fewer steps"}
        errors = {f"{row['rmse_dense']:.4f}" for row in rows if row["model"] == model and row["family"] == "baseline"}
        assert set(re.findall(r"0\.\d{4}", cells)) - {plan} <= errors
