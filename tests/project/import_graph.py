"""The import graph of the package: ``python tests/project/import_graph.py`` prints packages, edges and circles."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = "lazy_compile"
PASSES = f"{PACKAGE}.passes"
ROOT = Path(__file__).resolve().parents[2]

LAYERS = [  # the levels of packages, lowest first; imports go downward between them and inside each
    ["errors", "digests", "storage", "tree_specs", "config", "progress", "processes"],
    ["ir"],
    ["analysis", "policies", "capture"],
    ["passes", "pass_pipelines"],
    ["runtime"],
    ["planning", "calibration"],
    [
        *["backends", "backends.onnx", "backends.session", "backends.stream", "backends.runner", "backends.denoiser"],
        *["backends.onnxruntime", "backends.openvino", "backends.tensorrt", "backends.triton", "backends.open_runner"],
    ],
    ["integrations", "compiler", "plans", "verification", "execution", "side_by_side", "reporting"],
    ["bench.tasks", "bench", "demo", "cli", "__init__", "__main__"],
]


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name (a package's ends in ``.__init__``) -> file; the passes under the name that they are imported by."""
    modules = {}
    for package, folder in ((PACKAGE, root / PACKAGE), (PASSES, root / "passes")):
        for file in folder.rglob("*.py"):
            inner = file.relative_to(folder).with_suffix("").parts
            if package == PACKAGE and inner[0] == "passes":
                continue  # the symlink, where rglob follows it
            modules[".".join([package, *inner])] = file
    return modules


def imports_of(module: str, source: str, modules: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of this package that ``source`` imports, wherever the import stands."""
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
        else:
            continue
        for target in dict.fromkeys(targets):
            if target.split(".")[0] in (PACKAGE, "passes"):
                yield node.lineno, target


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """For each module those that it imports."""
    modules = find_modules(root)
    return {
        module.removesuffix(".__init__"): {
            target for _, target in imports_of(module, file.read_text(encoding="utf-8"), modules)
        }
        - {module.removesuffix(".__init__")}
        for module, file in modules.items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """For each node of a graph without circles the length of the longest chain of imports below it."""
    known: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in known:
            known[node] = 1 + max((level(target) for target in graph.get(node, ())), default=0)
        return known[node]

    return {node: level(node) for node in graph}


def package_of(module: str) -> str:
    """The folder of a module. A file of the root, or of ``backends``, stands for itself."""
    inner = module.split(".")[1:]
    if not inner:
        return "__init__"
    if inner[0] == "backends" or inner[:2] == ["bench", "tasks"]:
        return ".".join(inner[:2])
    return inner[0]


def package_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    result: dict[str, set[str]] = {}
    for module, targets in graph.items():
        own = result.setdefault(package_of(module), set())
        own |= {package_of(target) for target in targets} - {package_of(module)}
    return result


def main() -> None:
    files = import_graph()
    packages = package_graph(files)
    print(f"{len(files)} files, {sum(map(len, files.values()))} imports, {len(circles(files))} circles")
    print(f"{len(packages)} packages, {sum(map(len, packages.values()))} edges, {len(circles(packages))} circles")
    for group in (*circles(files), *circles(packages)):
        print("circle:", " ".join(group))
    print(f"{len(LAYERS)} levels of packages, each with the edges to levels below, and inside it:")
    for number, layer in enumerate(LAYERS, 1):
        targets = [target for package in layer for target in packages.get(package, ())]
        inside = sum(target in layer for target in targets)
        print(f"{number:3} {len(targets) - inside:3} {inside:2} ", " ".join(layer))
    if not circles(files):
        chains = max(levels(packages).values()), max(levels(files).values())
        print("the longest chain of imports has {} packages, {} files".format(*chains))


if __name__ == "__main__":
    main()
