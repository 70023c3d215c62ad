"""Modules that torch.export cannot look into, each as one operator that calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.capture.evaluation import comparable_evaluation, other_forward
from lazy_compile.capture.opaque_probe import RecordedCall, Unsuitable, probe
from lazy_compile.capture.restored_state import left_as_it_was
from lazy_compile.capture.restored_tensors import values_left_alone
from lazy_compile.capture.sharded_layers import call_with_hooks, has_shards, without_hooks
from lazy_compile.ir.opaque import OpaqueCall


@dataclass
class OpaqueModules:
    """The modules of a model that are not looked into while it is captured.

    Attributes:
        model: the model.
        reasons: why, by the path of the module.
        calls: what is known of each, one for each kind of call.
    """

    model: nn.Module
    reasons: dict[str, str] = field(default_factory=dict)
    calls: dict[str, list[tuple[RecordedCall, OpaqueCall]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __str__(self) -> str:
        first, *others = self.reasons
        return f"opaque {first}" + (f" and {len(others)} more" if others else "")

    def with_module(self, path: str, reason: str) -> OpaqueModules:
        """One more, and those of the same class; what lies inside of it is no longer one by itself."""
        kind = type(self.model.get_submodule(path))
        paths = [name for name, module in self.model.named_modules() if type(module) is kind and _is_own(kind)]
        reasons = self.reasons | dict.fromkeys([name for name in paths if name] or [path], reason) | {path: reason}
        outer = {
            name: why for name, why in reasons.items() if not any(name.startswith(f"{other}.") for other in reasons)
        }
        return OpaqueModules(self.model, outer)

    def learn(self, layout: CallLayout, tensors: Sequence[Tensor]) -> None:
        """Call the model on the example, note what it gives to these modules, and learn what they do with it.

        Raises:
            NotOneOperator: one of them cannot be an operator.
        """
        recorded: dict[str, list[RecordedCall]] = {path: [] for path in self.reasons}

        def recording(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                call, result = RecordedCall.of(forward, args, kwargs)
                if not any(call.layout == earlier.layout for earlier in recorded[path]):
                    recorded[path].append(call)
                return result

            return record

        with comparable_evaluation(self.model), left_as_it_was(self.model), values_left_alone(self.model):
            with self._replaced(recording):
                args, kwargs = layout.rebuild([tensor.detach().clone() for tensor in tensors])
                self.model(*args, **kwargs)
            for path, calls in recorded.items():
                module = self.model.get_submodule(path)
                try:
                    self.calls[path] = [
                        (
                            call.without_values(),
                            probe(call, module, path, self.reasons[path], tuple(_weights_taken(module))),
                        )
                        for call in calls
                    ]
                except Unsuitable as error:
                    raise NotOneOperator(path, str(error)) from error

    @contextmanager
    def installed(self) -> Iterator[list[OpaqueCall]]:
        """Within this context the modules are operators of a graph; those that were called are in the list."""
        used: list[OpaqueCall] = []

        def operator(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                layout, tensors = CallLayout.of(args, kwargs)
                for recorded, known in self.calls.get(path, ()):
                    if layout == recorded.layout:
                        used.append(known)
                        values = iter(torch.ops.lazy_compile.opaque(known.handle, tensors, known.own_weights()))
                        leaves = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in recorded.result]
                        return pytree.tree_unflatten(leaves, recorded.spec)
                raise ValueError(f"{path} is called otherwise than on the example")

            return call

        with self._replaced(operator), self._packed_weights_hidden():
            yield used

    @contextmanager
    def _replaced(self, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for path in self.reasons:
                module = self.model.get_submodule(path)
                forward = module.forward
                if has_shards(module):
                    forward = call_with_hooks(module, path)
                    stack.enter_context(without_hooks(module))
                stack.enter_context(other_forward(module, make(path, forward)))
            yield

    @contextmanager
    def _packed_weights_hidden(self) -> Iterator[None]:
        """Without parameters that export could not take over; the modules themselves use them when they are called."""
        hidden = []
        for path in self.reasons:
            for module in self.model.get_submodule(path).modules():
                for name, value in [*module._parameters.items()]:
                    if value is not None and not _is_plain(value):
                        hidden.append((module, dict(module._parameters)))
                        module._parameters[name] = None
        try:
            yield
        finally:
            for module, parameters in reversed(hidden):
                module._parameters.clear()
                module._parameters.update(parameters)


class NotOneOperator(Exception):
    """A module cannot be one operator; :attr:`path` is where it is."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path = path


def culprit(model: nn.Module, error: BaseException | None) -> str | None:
    """The path of the innermost module in whose call an export failed; empty for the model itself, None if unknown."""
    paths = {id(vars(module)): name for name, module in model.named_modules()}
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        innermost: str | None = None
        trace = error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if trace.tb_frame.f_code.co_name in _CALLS and isinstance(owner, nn.Module):
                innermost = paths.get(id(vars(owner)), innermost)
            trace = trace.tb_next
        if innermost is not None:
            return innermost
        error = error.__cause__ or error.__context__
    return None


_CALLS = ("_call_impl", "forward")


def scripted_modules(model: nn.Module) -> dict[str, str]:
    """Paths of the modules whose code calls what ``torch.jit`` has compiled, and the name of that."""
    found = {}
    for path, module in model.named_modules():
        functions = [value for _, value in inspect.getmembers(type(module), inspect.isfunction)]
        for function in [value for value in functions if _is_own(type(module)) and "torch" not in _file(value)]:
            names = [
                name
                for name in function.__code__.co_names
                if isinstance(function.__globals__.get(name), torch.jit.ScriptFunction)
            ]
            if names:
                found[path] = names[0]
    return found


def _file(function: Any) -> str:
    return str(function.__module__).partition(".")[0]


def parent_of(model: nn.Module, path: str) -> str:
    """The module around one; lists and dictionaries of modules are never called."""
    while path:
        path = path.rpartition(".")[0]
        if not isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
            break
    return path


def _is_own(kind: type) -> bool:
    """Whether a class is somebody's own and not torch's: then its instances do alike."""
    return not kind.__module__.startswith("torch.")


def _weights_taken(module: nn.Module) -> Iterator[str]:
    """Those that the operator is given; none where a hook casts or fetches them."""
    if hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook"):
        return
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if _is_plain(value):
            yield name


def _is_plain(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter, nn.Buffer) and not value.is_meta
