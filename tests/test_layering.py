"""Imports go downward only. The table is the whole rule; a new module takes its place in it."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

LAYERS = {  # lowest first
    "errors": ["errors"],
    "data": ["config", "branch", "schedule", "gate", "grouping", "policy", "program"],
    "infrastructure": [
        *["pass_manager", "ops", "gate_ops", "slots", "progress", "storage", "threads", "processes"],
        *["dataflow", "operators", "residual", "kinds", "rows", "row_places", "row_rules", "folded_rows"],
        *["extrapolation", "fake_quantize", "lazy_branch"],
    ],
    "passes": ["passes", "passes.*"],
    "middle": [
        *["call_layout", "value_guards", "tensor_builders", "tracing", "capture", "capture_lock", "environment"],
        "python_state",
        *["row_matching", "runtime", "timestep", "lazy_graph", "step_invariants", "graph_store", "module"],
        *["verify", "effects", "planning", "soft_step", "gate_start", "gate_trainer", "timings"],
        *["schedule_io", "baselines", "response", "search", "schedule_search"],
        *["calibration", "report", "report_figures", "artifact", "backends", "backends.*"],
    ],
    "compiler": ["compiler"],
    "front doors": [
        *["__init__", "__main__", "front_door", "cli*"],
        *["integrations", "integrations.*", "demo", "demo.*", "bench*"],
    ],
}
ORDER = list(LAYERS)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lazy_compile"
PASSES = f"{PACKAGE}.passes"


def find_modules() -> dict[str, Path]:
    """Dotted name (a package's ends in `.__init__`) -> file; the passes under the name that they are imported by."""
    files = [(PACKAGE, ROOT / "lazy_compile"), (PASSES, ROOT / "passes")]
    modules = {}
    for package, folder in files:
        for file in folder.rglob("*.py"):
            inner = file.relative_to(folder).with_suffix("").parts
            if package == PACKAGE and inner[0] == "passes":
                continue  # the symlink, where rglob follows it
            modules[".".join([package, *inner])] = file
    return modules


def layer_of(module: str) -> str | None:
    name = module.removesuffix(".__init__").removeprefix(PACKAGE).removeprefix(".") or "__init__"
    for layer, patterns in LAYERS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return layer
    return None


def is_pass(module: str) -> bool:
    return module.startswith(f"{PASSES}.") and not module.endswith(".__init__")


def imports_of(module: str, source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of this package that `source` imports, wherever the import stands."""
    names = {name.removesuffix(".__init__") for name in modules}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], base]).rstrip(".")
            members = [f"{base}.{alias.name}" for alias in node.names]
            targets = [member if member in names else base for member in members]
            if base == PACKAGE and is_pass(module):
                targets = [base]  # through the root, whatever the name
        else:
            continue
        for target in dict.fromkeys(targets):
            if target.split(".")[0] in (PACKAGE, "passes"):
                yield node.lineno, target


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    layer = layer_of(module)
    if layer is None:
        return [f"{module} stands in no layer: place it in LAYERS of tests/test_layering.py"]
    found = []
    for line, target in imports_of(module, source, modules):
        where = f"{module}:{line}"
        target_layer = layer_of(target)
        if target.split(".")[0] == "passes":
            found.append(f"{where}: {target} is imported as {PACKAGE}.{target}: an installed package has no other name")
        elif is_pass(module) and target == PACKAGE:
            found.append(f"{where}: a pass imports from submodules, never from the root of {PACKAGE}")
        elif is_pass(module) and (target == PASSES or target.startswith(f"{PASSES}.")):
            found.append(f"{where}: a pass never imports another pass ({target})")
        elif target_layer is not None and ORDER.index(target_layer) > ORDER.index(layer):
            found.append(f"{where}: {layer} imports {target} from {target_layer}, which is above it")
    return found


MODULES = find_modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downward(module: str) -> None:
    found = violations(module, MODULES[module].read_text(encoding="utf-8"), set(MODULES))
    assert not found, "\n".join(found)


def test_both_folders_are_seen() -> None:
    assert f"{PACKAGE}.errors" in MODULES
    assert f"{PASSES}.__init__" in MODULES


KNOWN = {
    f"lazy_compile.{name}"
    for name in [
        *["__init__", "errors", "branch", "dataflow", "capture", "compiler", "cli"],
        *["backends.__init__", "backends.onnx", "backends.tensorrt"],
        *["passes.__init__", "passes.canonicalize", "passes.insert_gates"],
    ]
}


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("lazy_compile.errors", "from lazy_compile.branch import X", "errors imports lazy_compile.branch from data"),
        ("lazy_compile.branch", "import lazy_compile.dataflow", "data imports lazy_compile.dataflow"),
        ("lazy_compile.branch", "from lazy_compile import dataflow", "data imports lazy_compile.dataflow"),
        ("lazy_compile.branch", "from lazy_compile import transform", "data imports lazy_compile from front doors"),
        ("lazy_compile.branch", "from .dataflow import X", "data imports lazy_compile.dataflow"),
        ("lazy_compile.branch", "from . import dataflow", "data imports lazy_compile.dataflow"),
        ("lazy_compile.dataflow", "def f():\n    from lazy_compile.capture import X", ":2: infrastructure imports"),
        (
            "lazy_compile.dataflow",
            "if TYPE_CHECKING:\n    import lazy_compile.passes.canonicalize",
            ":2: infrastructure",
        ),
        ("lazy_compile.backends.onnx", "from ..compiler import X", "middle imports lazy_compile.compiler"),
        ("lazy_compile.backends.__init__", "from ..compiler import X", "middle imports lazy_compile.compiler"),
        ("lazy_compile.compiler", "from lazy_compile.cli import main", "compiler imports lazy_compile.cli"),
        (
            "lazy_compile.passes.canonicalize",
            "from lazy_compile.capture import X",
            "passes imports lazy_compile.capture",
        ),
        ("lazy_compile.passes.canonicalize", "from lazy_compile.passes.insert_gates import X", "never imports another"),
        ("lazy_compile.passes.canonicalize", "from lazy_compile.passes import insert_gates", "never imports another"),
        ("lazy_compile.passes.canonicalize", "from .insert_gates import X", "never imports another pass"),
        ("lazy_compile.passes.canonicalize", "import lazy_compile", "never from the root"),
        ("lazy_compile.passes.canonicalize", "from lazy_compile import branch", "never from the root"),
        ("lazy_compile.passes.canonicalize", "from .. import branch", "never from the root"),
        ("lazy_compile.compiler", "from passes.canonicalize import X", "imported as lazy_compile.passes.canonicalize"),
        ("lazy_compile.drawer", "", "lazy_compile.drawer stands in no layer: place it in LAYERS"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source, KNOWN)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lazy_compile.branch", "import torch\nfrom lazy_compile.errors import X"),
        ("lazy_compile.branch", "from lazy_compile.config import X"),
        ("lazy_compile.passes.__init__", "from lazy_compile.passes.canonicalize import X"),
        ("lazy_compile.passes.canonicalize", "from lazy_compile.branch import X\nfrom ..dataflow import Y"),
        ("lazy_compile.backends.onnx", "from . import tensorrt\nfrom lazy_compile.passes.canonicalize import X"),
        ("lazy_compile.cli", "from lazy_compile import branch\nfrom lazy_compile import transform"),
        ("lazy_compile.__init__", "def __getattr__(name):\n    from lazy_compile.compiler import X"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(module, source, KNOWN) == []
