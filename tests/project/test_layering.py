"""Imports go downward only, between layers and inside them; ``LAYERS`` has a place for each package."""

from __future__ import annotations

import pytest

from project.import_graph import (
    LAYERS,
    PACKAGE,
    PASSES,
    circles,
    find_modules,
    import_graph,
    imports_of,
    levels,
    package_graph,
    package_of,
)

ORDER = [package for layer in LAYERS for package in layer]
MODULES = find_modules()


def is_pass(module: str) -> bool:
    return module.startswith(f"{PASSES}.") and not module.endswith(".__init__")


def violations(module: str, source: str) -> list[str]:
    package = package_of(module.removesuffix(".__init__"))
    if package not in ORDER:
        return [f"{module} has no place in the order of packages: give it one in LAYERS of tests/project"]
    found = []
    for line, target in imports_of(module, source, MODULES):
        where, below = f"{module}:{line}", package_of(target)
        if target.split(".")[0] == "passes":
            found.append(f"{where}: {target} is imported as {PACKAGE}.{target}: an installed package has no other name")
        elif is_pass(module) and target == PACKAGE:
            found.append(f"{where}: a pass imports from submodules, never from the root of {PACKAGE}")
        elif is_pass(module) and (target == PASSES or target.startswith(f"{PASSES}.")):
            found.append(f"{where}: a pass never imports another pass ({target})")
        elif below in ORDER and ORDER.index(below) > ORDER.index(package):
            found.append(f"{where}: {package} imports {target}, which is above it")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downward(module: str) -> None:
    found = violations(module, MODULES[module].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(import_graph()) == []
    assert circles(package_graph(import_graph())) == []


def test_the_inside_of_a_package_is_seen_as_well() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == [["a", "b", "c"]]
    assert levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


def test_both_folders_are_seen() -> None:
    assert f"{PACKAGE}.errors" in MODULES
    assert f"{PASSES}.__init__" in MODULES


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("errors", "from lazy_compile.ir.branch import X", "errors imports lazy_compile.ir.branch, which is above it"),
        ("ir.branch", "import lazy_compile.analysis.dataflow", "ir imports lazy_compile.analysis.dataflow"),
        ("ir.branch", "from lazy_compile.analysis import dataflow", "ir imports lazy_compile.analysis.dataflow"),
        ("ir.branch", "from lazy_compile import transform", "ir imports lazy_compile, which is above it"),
        ("ir.branch", "from ..analysis.dataflow import X", "ir imports lazy_compile.analysis.dataflow"),
        ("ir.branch", "def f():\n    from lazy_compile.capture.capture_model import X", ":2: ir imports"),
        ("analysis.dataflow", "if TYPE_CHECKING:\n    import lazy_compile.passes.canonicalize", ":2: analysis imports"),
        ("backends.onnx.export", "from ...compiler import X", "backends.onnx imports lazy_compile.compiler"),
        ("backends.__init__", "from ..compiler import X", "backends imports lazy_compile.compiler"),
        ("compiler", "from lazy_compile.cli.app import main", "compiler imports lazy_compile.cli.app"),
        ("passes.canonicalize", "from lazy_compile.runtime.cache import X", "passes imports lazy_compile.runtime"),
        ("passes.canonicalize", "from lazy_compile.passes.insert_gates import X", "never imports another"),
        ("passes.canonicalize", "from .insert_gates import X", "never imports another pass"),
        ("passes.canonicalize", "import lazy_compile", "never from the root"),
        ("compiler", "from passes.canonicalize import X", "imported as lazy_compile.passes.canonicalize"),
        ("drawer", "", "lazy_compile.drawer has no place in the order of packages"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, complaint: str) -> None:
    (found,) = violations(f"lazy_compile.{module}", source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ir.branch", "import torch\nfrom lazy_compile.errors import X"),
        ("passes.__init__", "from lazy_compile.passes.canonicalize import X"),
        ("passes.canonicalize", "from lazy_compile.ir.branch import X\nfrom ..analysis.dataflow import Y"),
        ("backends.tensorrt.build", "from ..onnx import export\nfrom lazy_compile.passes.canonicalize import X"),
        ("cli.app", "from lazy_compile.ir import branch"),
        ("__init__", "def __getattr__(name):\n    from lazy_compile.compiler import X"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(f"lazy_compile.{module}", source) == []
