"""The prologue of an exported model: a second file that computes what stays the same along a trajectory."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lazy_compile import pass_pipelines
from lazy_compile.backends.onnx.convert import convert, name_values
from lazy_compile.backends.onnx.metadata import Gating, OnnxMetadata
from lazy_compile.backends.onnx.sealed_file import PROLOGUE_KEY as PROLOGUE_KEY
from lazy_compile.backends.onnx.sizes import Size
from lazy_compile.backends.onnx.weight_places import write_places
from lazy_compile.digests import new_digest
from lazy_compile.errors import ArtifactError, ConfigError, import_optional
from lazy_compile.ir.operators import macs
from lazy_compile.ir.program import Program, Role

if TYPE_CHECKING:
    from onnx_ir import Model

    from lazy_compile.runtime.lazy_graph import LazyGraph
    from lazy_compile.runtime.module import LazyModule

logger = logging.getLogger("lazy_compile")


def prologue_path(step: Path, gating: Gating) -> Path:
    """Where the prologue of an exported model lies; those of a schedule, which lie in one folder, share one.

    >>> prologue_path(Path("m.onnx"), "input").name, prologue_path(Path("set/mask-0f.onnx"), "schedule").name
    ('m.prologue.onnx', 'prologue.onnx')
    """
    return step.with_name(f"{'' if gating == 'schedule' else f'{step.stem}.'}prologue{step.suffix}")


def waiting_path(step: Path, gating: Gating, digest: str) -> Path:
    """Where a new prologue lies while its model takes the place of an older one.

    Should the process end in between, the older model still finds its own prologue, and the new one finds this.
    """
    path = prologue_path(step, gating)
    return path.with_name(f".{path.stem}.{digest[:16]}{path.suffix}")


def find_prologue(step: Path, metadata: OnnxMetadata) -> Path | None:
    """The prologue that belongs to an exported model; None if it needs none.

    Raises:
        ArtifactError: it is missing.
    """
    if not metadata.prologue:
        return None
    waiting, path = waiting_path(step, metadata.gating, metadata.prologue), prologue_path(step, metadata.gating)
    if waiting.is_file():
        return waiting
    if not path.is_file():
        raise ArtifactError(
            f"{step} has no {path.name} beside it, which computes what stays the same along a trajectory; copy both, "
            "or make both again"
        )
    return path


def check_prologue(path: Path, digest: str, step: Path, metadata: OnnxMetadata) -> None:
    """
    Raises:
        ArtifactError: a prologue is that of another model.
    """
    if digest != metadata.prologue:
        raise ArtifactError(
            f"{path} is not the prologue of {step.name}: "
            f"{'it was exported with another model' if digest else 'export_onnx did not write it as one'}; copy both "
            "from one export or build, or make both again"
        )


def checked_names(invariants: Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        ConfigError: it is one name, of which a tuple would be its letters.
    """
    if isinstance(invariants, str):
        raise ConfigError(f"invariants is the string {invariants!r}; give a tuple of names")
    return tuple(invariants)


def hoisted_graph(lazy: LazyModule, graph: LazyGraph, invariants: Sequence[str]) -> LazyGraph:
    """The graph whose prologue computes what these inputs decide; the same one, and a warning, if nothing does.

    Raises:
        ConfigError: there is no such input, or it is the timestep.
    """
    known = graph.layout.names
    for name in invariants:
        if name not in known:
            raise ConfigError(f"{name!r} is no input that could stay the same; the inputs are {', '.join(known)}")
        if name == graph.timestep_input:
            raise ConfigError(f"{name!r} is the timestep, which changes at every step; name other inputs as invariants")
    if not invariants:
        return graph
    hoisted = lazy._store.hoisted(graph, frozenset(invariants))
    if hoisted.program.prologue is None:
        logger.warning(
            "nothing of %s can be hoisted: %s and the weights alone decide no matrix product, or only those of gated "
            "branches; the file is the same as without invariants",
            type(lazy.original).__name__, ", ".join(invariants),
        )  # fmt: skip
    return hoisted


def prologue_of(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The prologue of a program as a program of its own, and the names of its results."""
    assert program.prologue is not None
    names = tuple(item.name for item in program.inputs if item.role is Role.INVARIANT)
    before = [item.role for item in program.inputs].index(Role.INVARIANT)
    made = Program(program.prologue, program.inputs[:before], program.constants)
    return made, names


def prologue_macs(program: Program) -> int:
    """Multiply-accumulates of the prologue of a program, at the captured sizes; 0 without one."""
    return 0 if program.prologue is None else sum(map(macs, program.prologue.graph.nodes))


def make_prologue(
    original: nn.Module, program: Program, tensors: Sequence[Tensor], opset: int, shapes: Sequence[Sequence[Size]]
) -> Model:
    """The prologue of a program in ONNX; its inputs are those of the user's that it reads, by the names of these.

    For ``shapes`` see :func:`~lazy_compile.backends.onnx.convert.convert`.

    Raises:
        BackendError: an operator has no ONNX form.
    """
    own, results = prologue_of(program)
    own = pass_pipelines.prologue().run(own)
    model = convert(original, own, tensors, opset, shapes)
    name_values(model, [item.name for item in own.inputs if item.role is Role.USER], results)
    drop_unread_inputs(model, {str(value.name) for value in model.graph.inputs})
    write_places(model, original)
    model.metadata_props[PROLOGUE_KEY] = digest_of_prologue(model)
    return model


def without_prologue(program: Program) -> Program:
    """The program of a step alone: what a prologue computes comes in."""
    return replace(program, prologue=None)


def drop_unread_inputs(model: Model, names: Collection[str]) -> None:
    """Take out those of the named inputs that nothing reads: an engine has no place to bind them to."""
    for value in [value for value in model.graph.inputs if value.name in names and not value.uses()]:
        if not value.is_graph_output():
            model.graph.inputs.remove(value)


def digest_of_prologue(model: Model) -> str:
    """Over nodes and weights; where the weights will lie does not count."""
    ir = import_optional("onnx_ir", "onnx")
    content = new_digest()
    for name, value in sorted(model.graph.initializers.items()):
        content.update(f"{name} {value.dtype} {value.shape}".encode())
        content.update(b"" if value.const_value is None else value.const_value.tobytes())
    for node in model.graph:
        content.update(ir.to_proto(node).SerializeToString(deterministic=True))
    for value in (*model.graph.inputs, *model.graph.outputs):
        content.update(f"{value.name} {value.dtype} {value.shape}".encode())
    return str(content.hexdigest())
