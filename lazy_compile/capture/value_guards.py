"""Values that a model reads from its inputs or its own state while it is captured, and the check that they still hold.

``if mask.all(): ...`` or ``lengths.tolist()`` makes a graph that is right for one answer only. The tape keeps what was
done to the inputs, so that the answer can be worked out during the capture, where tensors hold no numbers, and again at
every call. ``if (self.mask == causal).all()`` asks the model's own state: it is asked again where that was written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from lazy_compile.errors import CaptureError

Function = Callable[..., Any]


@dataclass(frozen=True)
class Slot:
    """A tensor of the tape."""

    index: int


@dataclass(frozen=True)
class Operation:
    """One call on the tape; tensors are slots.

    Attributes:
        results: the slots of the tensors that it returns.
        answer: for a read, what it returned; None for a call that makes tensors.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Slot, ...] = ()
    answer: Any = None

    @property
    def is_read(self) -> bool:
        return self.answer is not None

    def run(self, values: dict[Slot, Tensor]) -> Any:
        args, kwargs = pytree.tree_map(
            lambda leaf: values[leaf] if isinstance(leaf, Slot) else leaf, (self.args, self.kwargs)
        )
        result = self.function(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        values.update(zip(self.results, made, strict=True) if self.results else ())
        return result


@dataclass(frozen=True)
class ValueGuards:
    """What must hold for a capture with value-dependent decisions to serve a call.

    Attributes:
        inputs: positions of the user's tensors that the decisions depend on.
        operations: from those inputs to the values that were read.
    """

    inputs: tuple[int, ...] = ()
    operations: tuple[Operation, ...] = ()

    def __bool__(self) -> bool:
        return any(operation.is_read for operation in self.operations)

    def hold(self, tensors: Sequence[Tensor] | Mapping[int, Tensor]) -> bool:
        """Whether every value that was read is the same for these inputs."""
        if not self:
            return True
        values = {Slot(position): tensors[position].detach().clone() for position in self.inputs}
        with torch.no_grad():
            for operation in self.operations:
                try:
                    result = operation.run(values)
                except (RuntimeError, IndexError, ValueError):
                    return False  # of another size, or out of range: nothing that this graph could serve
                if operation.is_read and not _same(result, operation.answer):
                    return False
        return True


@dataclass
class StateGuards:
    """What must hold of weights, buffers and other tensors of a model for a capture that read them.

    Attributes:
        sources: where each of the tensors is looked up that were read.
        guards: from those tensors to the values that were read.
    """

    sources: Mapping[int, Source] = field(default_factory=dict)
    guards: ValueGuards = field(default_factory=ValueGuards)
    _checked: list[tuple[Tensor, int]] = field(default_factory=list, init=False)

    def hold(self) -> bool:
        """Whether every value would be read as it was; asked again where a tensor was replaced or written to."""
        tensors = {position: values[name] for position, (values, name) in self.sources.items()}
        now = [(tensor, _version(tensor)) for tensor in tensors.values()]
        checked = self._checked
        if len(checked) != len(now) or any(a is not b or i != j for (a, i), (b, j) in zip(checked, now, strict=True)):
            if not self.guards.hold(tensors):
                return False
            self._checked = now
        return True


class Tape:
    """What a model did to tensors whose values are known: its inputs, and what is made from them and from constants.

    A value that depends on inputs and weights is not known: it could not be checked before the model has run.

    Args:
        examples: the user's own tensors, on which values are worked out.
    """

    KNOWN = "inputs"

    def __init__(self, examples: Sequence[Tensor]) -> None:
        self._examples = list(examples)
        self.begin(())

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Forget everything, and know the tensors that a capture passes in place of the examples."""
        self._operations: list[Operation] = []
        self._slots: dict[int, Slot] = {}
        self._kept: list[Tensor] = []
        self._storages: dict[Slot, int] = {}
        self._lost: set[int] = set()
        for tensor in inputs:
            self._slot_of(tensor)

    def knows(self, *values: Any) -> bool:
        """Whether the numbers in all these tensors can be worked out."""
        return all(
            id(leaf) in self._slots and _storage(leaf) not in self._lost
            for leaf in pytree.tree_leaves(values)
            if isinstance(leaf, Tensor)
        )

    def record(self, function: Function, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Note a call that was made, if all that it read is known; a known tensor that it spoils is known no longer."""
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        written = _written(function, args, kwargs)
        if self.knows(args, kwargs) and not _is_random(function):
            if made or written is not None:
                taken = self._as_slots(args, kwargs)
                self._operations.append(Operation(function, *taken, results=tuple(map(self._slot_of, made))))
        elif written is not None:
            self._lost.add(_storage(written))

    def read(self, function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The answer to a question for values: ``function`` called on the real tensors.

        Raises:
            CaptureError: there are none.
        """
        taken = self._as_slots(args, kwargs)
        question = Operation(function, *taken, answer=...)
        needed = self._needed([*(operation for operation in self._operations if not operation.is_read), question])
        examples = {Slot(position): self._examples[position] for position in self._asked(needed)}
        if any(example.is_meta for example in examples.values()):
            raise CaptureError(
                f"the model reads values of its {self.KNOWN} ({function.__name__.strip('_')}), and {self.KNOWN} on the "
                "meta device have none; capture it with real tensors"
            )
        with real_tensors():
            values = {slot: tensor.detach().clone() for slot, tensor in examples.items()}
            for operation in needed:
                answer = _concrete(operation).run(values)
        self._operations.append(Operation(function, *taken, answer=answer))
        return answer

    def guards(self) -> ValueGuards:
        """The reads that depend on inputs, and what leads to them."""
        dependent = {self._storages[Slot(position)] for position in range(len(self._examples))}
        kept = []
        for operation in self._operations:
            follows = bool(dependent & {self._storages[slot] for slot in _slots(operation)})
            if follows:
                dependent |= self._changed(operation)
            if follows or not operation.is_read:
                kept.append(operation)
        needed = [_concrete(operation) for operation in self._needed(kept)]
        return ValueGuards(self._asked(needed), tuple(needed))

    def _asked(self, operations: Sequence[Operation]) -> tuple[int, ...]:
        """Positions of the examples that operations take."""
        used = {slot.index for operation in operations for slot in _slots(operation)}
        return tuple(sorted(used & set(range(len(self._examples)))))

    def _needed(self, operations: Sequence[Operation]) -> list[Operation]:
        """The reads and what they depend on; whatever shares memory with something needed is."""
        wanted: set[int] = set()
        needed = []
        for operation in reversed(operations):
            if operation.is_read or self._changed(operation) & wanted:
                wanted |= {self._storages[slot] for slot in _slots(operation)}
                needed.append(operation)
        return needed[::-1]

    def _changed(self, operation: Operation) -> set[int]:
        """The memory that an operation makes or writes to."""
        written = _written(operation.function, operation.args, operation.kwargs)
        slots = [*operation.results, *([written] if isinstance(written, Slot) else [])]
        return {self._storages[slot] for slot in slots}

    def _slot_of(self, tensor: Tensor) -> Slot:
        if id(tensor) not in self._slots:
            self._slots[id(tensor)] = slot = Slot(len(self._kept))
            self._kept.append(tensor)  # kept, so that its id stays its own
            self._storages[slot] = _storage(tensor)
        return self._slots[id(tensor)]

    def _as_slots(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
            lambda leaf: self._slots[id(leaf)] if isinstance(leaf, Tensor) else leaf, (tuple(args), kwargs)
        )
        return taken


class StateTape(Tape):
    """What a model did to its own weights, buffers and other tensors, and to constants, without any of its inputs."""

    KNOWN = "weights"

    def __init__(self, model: nn.Module) -> None:
        self._sources = list(_sources(model))
        super().__init__(self._now())

    def begin_now(self) -> None:
        """Know the tensors that stand for the model's own while it is captured."""
        self.begin(self._now())

    def state_guards(self) -> StateGuards:
        guards = self.guards()
        return StateGuards({position: self._sources[position] for position in guards.inputs}, guards)

    def _now(self) -> list[Tensor]:
        return [values[name] for values, name in self._sources]


Source = tuple[Mapping[str, Any], str]
"""What holds a tensor of a model, and under which name."""


def _sources(model: nn.Module) -> Iterator[Source]:
    """Each plain tensor that a model holds, once."""
    seen: set[int] = set()
    for module in model.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for name, value in values.items():
                if isinstance(value, Tensor) and id(value) not in seen and not is_traceable_wrapper_subclass(value):
                    seen.add(id(value))
                    yield values, name


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; what was made under inference mode does not count it."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def real_tensors() -> Iterator[None]:
    """Work on real tensors during a capture."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


def _slots(operation: Operation) -> Iterator[Slot]:
    for leaf in pytree.tree_leaves((operation.args, operation.kwargs, operation.results)):
        if isinstance(leaf, Slot):
            yield leaf


def _concrete(operation: Operation) -> Operation:
    """With plain numbers for symbolic sizes; asking for one pins the size in the capture."""
    args, kwargs = pytree.tree_map(
        lambda leaf: int(leaf) if isinstance(leaf, torch.SymInt) else leaf, (operation.args, operation.kwargs)
    )
    return Operation(operation.function, args, kwargs, operation.results, operation.answer)


_WRITING = frozenset(
    {
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__"),
        *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__ipow__"),
    }
)


def _written(function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The tensor, or slot, that a call writes to; None if it writes to none."""
    name = getattr(function, "__name__", "")
    if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
        return args[0] if args else None
    return kwargs.get("out")


def _is_random(function: Function) -> bool:
    name = getattr(function, "__name__", "")
    return any(word in name for word in ("rand", "bernoulli", "normal_", "multinomial", "dropout", "uniform_"))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same(seen: Any, expected: Any) -> bool:
    if isinstance(seen, Tensor) and isinstance(expected, Tensor):
        return torch.equal(seen, expected)
    if isinstance(seen, np.ndarray) and isinstance(expected, np.ndarray):
        return bool(np.array_equal(seen, expected, equal_nan=seen.dtype.kind == "f"))
    if isinstance(seen, list | tuple) and isinstance(expected, list | tuple):
        return len(seen) == len(expected) and all(map(_same, seen, expected))
    return bool(seen == expected)
