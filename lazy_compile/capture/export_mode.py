"""What torch.export is helped with while it runs a model: code that is fine in eager mode and that it trips over."""

from __future__ import annotations

import builtins
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad_mode
from torch.autograd.function import FunctionCtx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lazy_compile.capture.tensor_constructors import build_from_tensors
from lazy_compile.capture.value_guards import StateTape, Tape, real_tensors

logger = logging.getLogger("lazy_compile")

SECONDS_BETWEEN_NEWS = 3.0
"""How often a long capture says how far it is."""

READS = frozenset(
    {
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__contains__"),
    }
)
"""Functions that hand a tensor's numbers to Python."""

COUNTS = frozenset({"nonzero", "argwhere", "masked_select", "bincount", "unique", "unique_consecutive", "one_hot"})
"""Functions whose result has as many elements as the numbers in a tensor say."""


_PLACE = re.compile(r"L\['\w+'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
"""How torch.export names a size of an input."""


@contextmanager
def every_shape_computed() -> Iterator[None]:
    """An export that does not look up the shapes of a result among those of earlier calls of its operator.

    With symbolic sizes an entry takes longer to write, and to check, than the shape to compute: a third of an export.
    """
    from torch._dynamo import config  # a second of import, which an export needs anyway

    with config.patch(fake_tensor_cache_enabled=False):  # in this thread
        yield


class ExportAid(TorchFunctionMode):
    """Rewrites calls to torch while a model is exported.

    1. ``tensor.data`` becomes ``tensor.detach()``: export loses track of what is written through the former.
    2. ``torch.tensor(t)``, ``torch.full(size, t)`` and their like, of a tensor ``t``, are built from ``t`` instead of
       from its value.
    3. What the model computes inside ``torch.no_grad()`` is detached where it leaves such a region; the capture itself
       runs without gradients, so that nothing else would remember.
    4. With tapes, a value that is read from the model's inputs, or from its state, is worked out on the example; a
       tensor whose size depends on such values becomes a constant. A tape notes both, so that a later call can be
       checked.
    5. ``max(lengths)`` and ``min(lengths)`` of one tensor, which export takes for those of two, reduce it.
    6. ``np.sqrt`` of a size, which asks it for a method of that name, finds one.

    Args:
        name: of the model, for a capture that takes long.

    Attributes:
        inputs: what is known of the inputs; None to let every read fail.
        state: what is known of the weights.
        stuck: where the model read a value that depends on inputs and weights; empty if it did not.
        fixed: where it made a Python number of a size, by ``len()`` or ``int()``, which fixes that size.
        fixing_lines: the lines at which axes of the inputs became fixed, by position and axis.
    """

    def __init__(self, name: str, inputs: Tape | None = None, state: StateTape | None = None) -> None:
        super().__init__()
        self._news = _News(name)
        self.inputs, self.state = inputs, state
        self._tapes = [tape for tape in (inputs, state) if tape is not None]
        self.stuck = self.fixed = ""
        self.fixing_lines: dict[tuple[int, int], str] = {}
        self._numbers: dict[int, Tensor] = {}
        self._gradients = GradientRegions()

    def begin(self, inputs: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
        """Start with the inputs as export passes them, and those of them that the caller gave as Python numbers."""
        self._numbers = {id(tensor): tensor for tensor in numbers}
        self._gradients = GradientRegions()
        if self.inputs is not None:
            self.inputs.begin(inputs)
        if self.state is not None:
            self.state.begin_now()

    def __enter__(self) -> ExportAid:
        original = self._int_of_size = torch.SymFloat.__int__

        def note(size: torch.SymFloat) -> int:
            self.fixed = self.fixed or f"int() {_calling_line()}"
            return int(original(size))  # type: ignore[no-untyped-call]

        to_number = self._number_of_size = torch.SymInt.__int__

        def note_number(size: torch.SymInt) -> int:
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
                self.fixed = self.fixed or f"int() {_calling_line()}"
            return int(to_number(size))  # type: ignore[no-untyped-call]

        replace = self._set_replacement = ShapeEnv._set_replacement

        def note_fixed(sizes: ShapeEnv, symbol: Any, value: Any, *args: Any) -> None:
            if value.is_number:
                for source in sizes.var_to_sources.get(symbol, ()):
                    if (place := _PLACE.fullmatch(source.name)) is not None:
                        self.fixing_lines.setdefault((int(place[1]), int(place[2])), _calling_line())
            replace(sizes, symbol, value, *args)

        ShapeEnv._set_replacement = note_fixed  # type: ignore[method-assign, assignment]
        torch.SymFloat.__int__, torch.SymInt.__int__ = note, note_number  # type: ignore[method-assign]
        self._builtins = builtins.max, builtins.min
        builtins.max, builtins.min = (
            _of_one_tensor(builtins.max, Tensor.amax),
            _of_one_tensor(builtins.min, Tensor.amin),
        )
        torch.SymInt.sqrt = torch.SymFloat.sqrt = torch.sym_sqrt  # type: ignore[attr-defined]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        builtins.max, builtins.min = self._builtins
        torch.SymFloat.__int__ = self._int_of_size  # type: ignore[method-assign]
        torch.SymInt.__int__ = self._number_of_size  # type: ignore[method-assign]
        ShapeEnv._set_replacement = self._set_replacement  # type: ignore[method-assign]
        del torch.SymInt.sqrt, torch.SymFloat.sqrt  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if not torch.compiler.is_dynamo_compiling():  # it reads this mode, too, and knows no clock
            self._news.count()
        if func is torch._C._set_grad_enabled:
            return self._gradients.switch(*args)
        if name == "__len__" and isinstance(args[0].shape[0], torch.SymInt):
            self.fixed = self.fixed or f"len() {_calling_line()}"
        args, kwargs = self._gradients.enter(args, kwargs)
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            func, args, name = Tensor.detach, args[:1], "detach"
        if (built := build_from_tensors(name, args, kwargs, self._dtype_of)) is not None:
            return built
        result = self._gradients.leave(self._call(func, name, args, kwargs))
        if self._numbers and isinstance(result, Tensor) and result.dim() == 0:
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if given and all(id(leaf) in self._numbers for leaf in given):
                self._numbers[id(result)] = result
        return result

    def detached(self, result: Any) -> Any:
        """What the model returns, without gradients where they end inside the model."""
        return self._gradients.outside(result)

    def remembers(self, tensor: Tensor) -> tuple[bool, bool]:
        """Whether it stands for a Python number, and whether it was made where gradients are switched off."""
        return id(tensor) in self._numbers, self._gradients.made(tensor)

    @property
    def count_remembered(self) -> tuple[int, int]:
        """Of how many tensors it knows either."""
        return len(self._numbers), len(self._gradients)

    @property
    def gradients_enabled(self) -> bool:
        return self._gradients.enabled

    def _call(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self._tapes:
            return func(*args, **kwargs)
        if name == "__iter__":
            return iter(self._call(torch.unbind, "unbind", args[:1], {}))
        if name in READS and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            tape = self._tape_that_knows(args, kwargs)
            if tape is not None:
                return tape.read(func, args, kwargs)
            self.stuck = self.stuck or f"{name.strip('_')}() {_calling_line()}"
            return func(*args, **kwargs)
        if _repeats_by_tensor(name, args, kwargs):
            return self._repeated(func, args, kwargs)
        if name in COUNTS or (name == "where" and len(args) == 1):
            return self._counted(func, args, kwargs)
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._read_index(args[1]), *args[2:])
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        for tape in self._tapes:
            tape.record(func, args, kwargs, result)

    def _tape_that_knows(self, *values: Any) -> Tape | None:
        return next((tape for tape in self._tapes if tape.knows(*values)), None)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        """What a constructor makes of a tensor: a floating Python number takes the default type."""
        number = id(tensor) in self._numbers and tensor.is_floating_point()
        return torch.get_default_dtype() if number else tensor.dtype

    def _counted(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result as a constant, where its values are known."""
        tape = self._tape_that_knows(args, kwargs)
        if tape is None:
            return func(*args, **kwargs)
        constants = pytree.tree_map_only(Tensor, _constant, tape.read(func, args, kwargs))
        self._record(func, args, kwargs, constants)
        return constants

    def _repeated(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What is repeated a known number of times is picked by an index."""
        call = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
        source, repeats, axis = call["input"], call.get("repeats"), call.get("dim")
        if repeats is None or self._tape_that_knows(repeats) is None:
            return self._counted(func, args, kwargs)
        if axis is None:
            source, axis = self._call(Tensor.flatten, "flatten", (source,), {}), 0
        each = self._call(Tensor.expand, "expand", (repeats, source.shape[axis]), {})
        index = self._counted(torch.repeat_interleave, (each,), {})
        return self._call(torch.index_select, "index_select", (source, axis, index), {})

    def _read_index(self, index: Any) -> Any:
        """An index whose known boolean masks are replaced by the positions they select, and known bounds by numbers."""
        positions: list[Any] = []
        for item in index if isinstance(index, tuple) else (index,):
            if isinstance(item, slice):
                positions.append(slice(*map(self._read_bound, (item.start, item.stop, item.step))))
            elif _is_mask(item) and self._tape_that_knows(item) is not None:
                found = self._counted(torch.nonzero, (item,), {})
                positions += [found[:, axis] for axis in range(item.dim())]
            else:
                positions.append(item)
        return tuple(positions) if isinstance(index, tuple) or len(positions) != 1 else positions[0]

    def _read_bound(self, bound: Any) -> Any:
        tape = self._tape_that_knows(bound) if isinstance(bound, Tensor) else None
        return bound if tape is None else tape.read(Tensor.item, (bound,), {})


def _of_one_tensor(function: Callable[..., Any], reduction: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def of_one(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 1 and not kwargs:
            return reduction(args[0])
        return function(*args, **kwargs)

    return of_one


class _News:
    """Counts the calls of a capture, and says how many there were if it takes long."""

    def __init__(self, name: str) -> None:
        self._name, self._calls = name, 0
        self._start = self._told = time.monotonic()

    def count(self) -> None:
        self._calls += 1
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_NEWS:
            self._told = now
            logger.info("capturing %s: %d operators after %.0f s", self._name, self._calls, now - self._start)


class GradientRegions:
    """Follows where a model switches gradients off, in a capture that runs without them throughout.

    Both ends of a region set the same mode, so they are distinguished by the context manager on the stack.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._before: dict[int, tuple[Any, bool]] = {}
        self._made_inside: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._made_inside)

    def made(self, tensor: Tensor) -> bool:
        return id(tensor) in self._made_inside

    def switch(self, enabled: bool) -> None:
        """A call to ``torch._C._set_grad_enabled``, which is not made.

        In the forward of an autograd function nothing records gradients anyway: one that switches them off, to compute
        all again on the way back (gradient checkpointing of one's own), says nothing about what it returns.
        """
        if _is_in_autograd_function():
            return
        manager, method = _grad_manager()
        if method in ("__exit__", "__call__"):
            _, self.enabled = self._before.pop(id(manager), (None, enabled))
            return
        if method:
            self._before.setdefault(id(manager), (manager, self.enabled))
        self.enabled = enabled

    def enter(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments of a call to torch."""
        return self.outside((args, kwargs)) if self.enabled and self._made_inside else (args, kwargs)

    def leave(self, result: Any) -> Any:
        """The result of a call to torch."""
        if not self.enabled:
            tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            self._made_inside |= {id(leaf): leaf for leaf in tensors if leaf.is_floating_point()}
        return result

    def outside(self, values: Any) -> Any:
        """Values as they are seen where gradients flow."""
        return pytree.tree_map_only(
            Tensor, lambda leaf: leaf.detach() if id(leaf) in self._made_inside else leaf, values
        )


def _is_in_autograd_function() -> bool:
    for frame in _frames():
        first = frame.f_code.co_varnames[:1]
        if frame.f_code.co_name == "forward" and first and isinstance(frame.f_locals.get(first[0]), FunctionCtx):
            return True
    return False


def _grad_manager() -> tuple[Any, str]:
    """The context manager of ``torch.autograd.grad_mode`` that switches, the outermost if they nest, and its method."""
    found: tuple[Any, str] = (None, "")
    for frame in islice(_frames(), 12):
        if frame.f_code.co_filename == grad_mode.__file__:
            found = frame.f_locals.get("self"), frame.f_code.co_name
        elif found[1]:
            break
    return found


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool and item.dim() > 0


def _repeats_by_tensor(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return name == "repeat_interleave" and any(isinstance(item, Tensor) for item in [*args[1:], *kwargs.values()])


def _constant(value: Tensor) -> Tensor:
    """A tensor of the trace with the numbers of a real one."""
    with real_tensors():
        numbers, dtype, device = value.tolist(), value.dtype, value.device
    return torch.tensor(numbers, dtype=dtype, device=device).reshape(tuple(value.shape))


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", ""))


def _calling_line() -> str:
    """``"in moe_infer, transformer.py:366"``: the innermost frame that is neither torch's nor this package's."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in _frames():
        file = frame.f_code.co_filename
        if not file.startswith(own) and not file.startswith("<"):
            return f"in {frame.f_code.co_name}, {Path(file).name}:{frame.f_lineno}"
    return "somewhere"


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]
