"""The passes lie at the top level of the repository, and inside the package everywhere else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_passes_are_imported_from_the_top_level_folder() -> None:
    import lazy_compile.passes

    assert (ROOT / "lazy_compile" / "passes").is_symlink()
    assert Path(lazy_compile.passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names inside a wheel built from a copy, which no earlier build can have left anything in."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tree)
    for name in ["lazy_compile", "passes", "tests", "examples"]:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_wheel_holds_every_module_of_the_tree(wheel: set[str]) -> None:
    package = (
        file for file in (ROOT / "lazy_compile").rglob("*.py") if (ROOT / "lazy_compile/passes") not in file.parents
    )
    expected = {file.relative_to(ROOT).as_posix() for file in package}
    expected |= {f"lazy_compile/passes/{file.name}" for file in (ROOT / "passes").glob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == expected


@pytest.mark.slow
def test_wheel_says_that_it_is_typed(wheel: set[str]) -> None:
    assert "lazy_compile/py.typed" in wheel


@pytest.mark.slow
def test_wheel_holds_nothing_else_at_the_top(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"lazy_compile", "lazy_compile-0.1.0.dist-info"}


@pytest.mark.slow
def test_trained_weights_are_left_out_on_purpose(wheel: set[str], tmp_path: Path) -> None:
    """Digits and scenes are trained where they are missing; the emoji, 18 MB, come with a checkout."""
    shutil.copytree(ROOT / "examples" / "emoji", tmp_path / "examples" / "emoji")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tmp_path)
    for name in ["lazy_compile", "passes"]:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_sdist('out')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {*archive.getnames(), *wheel}
    assert not [name for name in names if name.endswith(".safetensors")]
    assert file.stat().st_size < 2e6
