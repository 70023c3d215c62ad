"""One contract for every pass, and the runner that holds passes to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lazy_compile.errors import PassError
from lazy_compile.ir.program import Program


@dataclass(frozen=True)
class PassResult:
    """The program after a pass, and whether it differs from the one before."""

    program: Program
    modified: bool


class GraphPass(ABC):
    """A transformation of a :class:`Program`; its options are fields of the subclass, a frozen dataclass."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def apply(self, program: Program) -> bool:
        """Edit ``program``, which is a private copy, in place. Return whether anything was changed."""

    def __call__(self, program: Program) -> PassResult:
        """Run on a copy, then check the result.

        Raises:
            PassError: the graph is malformed, or ``modified`` does not say the truth.
        """
        result = program.copy()
        modified = self.apply(result)
        try:
            result.graph.lint()
        except RuntimeError as error:
            raise PassError(f"pass {self.name} left a malformed graph: {error}") from error
        if len(result.inputs) != len(result.placeholders):
            raise PassError(
                f"pass {self.name}: {len(result.inputs)} inputs described, {len(result.placeholders)} exist"
            )
        before, after = _description(program), _description(result)
        if modified != (before != after):
            truth = "left the program as it was" if modified else "changed the program"
            raise PassError(f"pass {self.name} {truth} but reported modified={modified}")
        if before[0] != after[0]:  # the code of a copy is up to date
            result.graph_module.recompile()
        return PassResult(result, modified)


class PassManager:
    """Runs passes in order, and can stop after one of them to show what it made."""

    def __init__(self, passes: Sequence[GraphPass]) -> None:
        self.passes = tuple(passes)

    def run(self, program: Program, *, until: str | None = None) -> Program:
        """Run all passes, or those up to and including the one named ``until``.

        Raises:
            PassError: no pass has that name.
        """
        names = [item.name for item in self.passes]
        if until is not None and until not in names:
            raise PassError(f"there is no pass {until!r}; the passes are {', '.join(names)}")
        for item in self.passes:
            program = item(program).program
            if item.name == until:
                break
        return program


def _description(program: Program) -> tuple[object, ...]:
    modules = [(name, id(module)) for name, module in program.graph_module.named_children()]
    return str(program.graph), modules, program.inputs, program.branches, program.refusals
