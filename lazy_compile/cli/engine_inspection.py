"""What inspect shows of an engine, or of the log of its build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lazy_compile.errors import ConfigError
from lazy_compile.reporting.terminal_tables import add_row, new_table, show

if TYPE_CHECKING:
    from lazy_compile.backends.tensorrt.check import EngineStructure
    from lazy_compile.backends.tensorrt.layers import EngineLayer, LayerRole


def is_engine(source: str) -> bool:
    """Whether this names an engine, a folder of engines, or a file that may be the log of a build."""
    from lazy_compile.backends.onnx.masks import MANIFEST

    path = Path(source)
    return (path / MANIFEST).is_file() or (path.is_file() and path.suffix not in (".pt2", ".onnx"))


def inspect_engine(source: str, branches: int | None, picture: Path | None, json: bool) -> None:
    """Show what a builder made, and fail if its branches are not what they should be.

    Raises:
        VerificationError: a branch is missing, or something heavy runs outside of it.
        ArtifactError: the file is neither an engine with its description nor such a log.
    """
    structures = read_structures(Path(source), branches)
    values = {name: structure_values(structure) for name, structure in structures.items()}
    if picture is not None:
        _write_picture(picture, structures)
    rendered: list[Table | str] = []
    for name, structure in structures.items():
        rendered += [name, arm_table(structure), _verdict(structure)]
    show({"engines": values}, json, *rendered)
    for name, structure in structures.items():
        structure.require(name)


def read_structures(path: Path, branches: int | None = None) -> dict[str, EngineStructure]:
    """The structure of each engine by its file.

    Args:
        path: an engine with its description beside it, a folder of them, or the log of a build, which knows nothing of
            the ONNX model.
        branches: how many there should be, where only a log says so.
    """
    from lazy_compile.backends.onnx.masks import MANIFEST, ScheduleVariants
    from lazy_compile.backends.tensorrt.check import check_branches
    from lazy_compile.backends.tensorrt.layers import parse_layers
    from lazy_compile.backends.tensorrt.sidecar import EngineSidecar, path_beside

    engines = list(ScheduleVariants.load(path).files.values()) if (path / MANIFEST).is_file() else []
    if engines or path_beside(path).is_file() or b"\0" in path.read_bytes():
        sidecars = {file: EngineSidecar.load(file) for file in engines or [path]}
        for file, sidecar in sidecars.items():
            sidecar.check_file(file)
        return {str(file): sidecar.structure() for file, sidecar in sidecars.items()}
    return {str(path): check_branches(parse_layers(path.read_text(errors="replace")), branches)}


def structure_values(structure: EngineStructure) -> dict[str, Any]:
    """For ``--json``."""
    lines = [
        {
            "branch": None if branch is None else branch.name,
            "every_step": _names(always),
            "compute": [] if branch is None else _names(branch.compute),
            "reuse": [] if branch is None else _names(branch.reuse),
        }
        for always, branch in structure.segments()
    ]
    return {**structure.summary(), "segments": lines}


def arm_table(structure: EngineStructure) -> Table:
    """One line for each branch: what runs at every step before it, and in either arm."""
    table = new_table("branch", "before it, at every step", "computes", "reuses")
    for always, branch in structure.segments():
        arms = ((), ()) if branch is None else (branch.compute, branch.reuse)
        add_row(table, "after the last" if branch is None else branch.name, *map(_counted, (always, *arms)))
    return table


def _counted(layers: Sequence[EngineLayer]) -> str:
    """``2 products, 1 fused attention, 1 host copy, 5 others``."""
    counts = Counter(layer.role for layer in layers)
    named = ((counts[role], names[counts[role] > 1]) for role, names in _NAMES.items())
    return ", ".join(f"{count} {name}" for count, name in named if count) or "-"


_NAMES: Mapping[LayerRole, tuple[str, str]] = {
    "product": ("product", "products"),
    "attention": ("fused attention", "fused attentions"),
    "host copy": ("host copy", "host copies"),
    "other": ("other", "others"),
}


def _verdict(structure: EngineStructure) -> str:
    found = structure.summary()
    heavy = f"{found['heavy_inside']} heavy kernels in branches, {found['heavy_always']} at every step"
    line = f"{found['branches']} branches, {heavy}, {found['fused_attention']} fused attentions"
    copies = f"{found['host_copies']} host copies, {found['host_copies_before_first_branch']} before the first branch"
    return "\n".join([f"{line}, {copies}", *structure.problems])


def _names(layers: Sequence[EngineLayer]) -> list[str]:
    return [layer.name for layer in layers]


def _write_picture(picture: Path, structures: Mapping[str, EngineStructure]) -> None:
    from lazy_compile.backends.tensorrt.engine_picture import draw
    from lazy_compile.storage import atomic_path

    if picture.suffix != ".svg" or len(structures) > 1:
        raise ConfigError(f"--picture {picture}: it is an .svg file of one engine; give one engine and such a name")
    (name, structure) = next(iter(structures.items()))
    with atomic_path(picture) as temporary:
        temporary.write_text(draw(structure, Path(name).name))
