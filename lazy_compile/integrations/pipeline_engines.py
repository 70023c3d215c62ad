"""From a diffusers pipeline to one that runs an exported model, in one call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lazy_compile.backends.onnx.export import export_onnx
from lazy_compile.backends.onnx.metadata import Gating
from lazy_compile.backends.onnx.sizes import Shape, ShapeRange
from lazy_compile.backends.tensorrt.build import build_engine, build_engines
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.capture.call_layout import CallLayout
from lazy_compile.config import LazyConfig
from lazy_compile.errors import BackendError, ConfigError
from lazy_compile.integrations.diffusers_pipeline import (
    denoiser_names,
    is_pipeline,
    models_exchanged,
    transform_pipeline,
)
from lazy_compile.integrations.engine_module import EngineModule, call_by_name
from lazy_compile.integrations.pipeline_sampling import without_progress_bar
from lazy_compile.policies.presets import PolicyLike, as_policy
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.runtime.module import LazyModule


def export_pipeline(
    pipe: Any,
    path: str | Path,
    calls: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    component: str | None = None,
    policy: PolicyLike | None = None,
    gating: Gating | None = None,
    invariants: Sequence[str] = (),
    build: BuildConfig | None = None,
    on_progress: OnProgress = no_progress,
) -> EngineModule:
    """Export the denoiser of a pipeline, and let the pipeline run what was written.

    The pipeline makes one step of each call, to show how it calls its denoiser. Its other models are left as they are.
    In ONNX Runtime the file serves all sizes that its graph holds for: other resolutions, prompts of other lengths,
    other numbers of images, guidance on and off. An engine serves what lies between the sizes of the calls.

    >>> export_pipeline(pipe, "sd3.onnx", {"prompt": "a lighthouse"}, policy="balanced")  # doctest: +SKIP
    >>> pipe("a lighthouse", height=768, num_images_per_prompt=2)                         # doctest: +SKIP

    Args:
        pipe: a diffusers pipeline. Where its denoiser is not lazy yet, it is made so.
        path: the ONNX file to write, see :func:`~lazy_compile.backends.onnx.export.export_onnx`. An engine is written
            beside it: ``sd3.engine``.
        calls: arguments of one call of the pipeline, or of several. The engine is optimised for the first.
        component: which denoiser, by name, where a pipeline has several; export one after the other.
        policy: the rule that it follows, and that the file carries; None leaves it to the lazy model.
        gating: who decides; None takes ``"input"`` for a policy that knows its decisions before a step, else
            ``"predicate"``.
        invariants: see ``export_onnx``.
        build: options of a TensorRT engine to build and run; None runs the file in ONNX Runtime. Its ``profiles`` take
            the place of the sizes of the calls.
        on_progress: called after each stage.

    Returns:
        What stands in the pipeline now; its ``policy`` can be changed, and its ``stats`` tell what was reused.

    Raises:
        ConfigError: this is no pipeline, a call does not reach its denoiser, or the model fixes a size that differs
            between the calls. The pipeline then keeps its lazy model.
        BackendError: the model cannot be exported or built, or there is no GPU for an engine.
    """
    if build is not None and not torch.cuda.is_available():
        raise BackendError(
            "an engine runs on a GPU, and PyTorch sees none here; leave build out to run the file in ONNX Runtime, and "
            'build it with build_engine() for EngineModule("m.engine", like=...) elsewhere'
        )
    name, lazy = _denoiser(pipe, component)
    lazy.policy = lazy.policy if policy is None else as_policy(policy)
    seen = _observe(pipe, lazy, [calls] if isinstance(calls, Mapping) else calls)
    gating = gating or ("predicate" if lazy.policy.reads_gates and not lazy.policy.known_before_step else "input")
    export_onnx(lazy, path, seen.example, gating=gating, invariants=invariants, on_progress=on_progress)
    source = Path(path)
    if build is not None:
        source, options = source.with_suffix(".engine"), replace(build, profiles=build.profiles or (seen.range,))
        make = build_engines if gating == "schedule" else build_engine
        make(path, source, options, on_progress=on_progress)
    engine = EngineModule(source, like=lazy, config=lazy.lazy_config)
    for shapes in seen.shapes:
        engine.denoiser.runner.metadata.sizes_of(shapes)
    with models_exchanged(pipe):
        setattr(pipe, name, engine)
    return engine


def _denoiser(pipe: Any, component: str | None) -> tuple[str, LazyModule]:
    if not is_pipeline(pipe):
        raise ConfigError(
            f"export_pipeline() takes a diffusers pipeline; seen {type(pipe).__name__}: export other models with "
            "export_onnx()"
        )
    names = denoiser_names(pipe)
    if component is None and len(names) != 1:
        raise ConfigError(
            f"{type(pipe).__name__} has {len(names)} denoisers ({', '.join(names) or 'none'}); name one: component=..."
        )
    name = component or names[0]
    if type(pipe.components.get(name)) is EngineModule:
        raise ConfigError(f"{name} of this {type(pipe).__name__} is exported already; load the original again")
    if not isinstance(pipe.components.get(name), LazyModule):
        transform_pipeline(pipe, LazyConfig(), [name])
    return name, pipe.components[name]


@dataclass
class _Seen:
    """How a pipeline calls its denoiser.

    Attributes:
        example: the arguments of the first call, by name.
        shapes: of the tensors of all calls.
    """

    example: dict[str, Any] = field(default_factory=dict)
    shapes: list[dict[str, Shape]] = field(default_factory=list)

    @property
    def range(self) -> ShapeRange:
        least, most = ({name: self._bound(name, choose) for name in self.shapes[0]} for choose in (min, max))
        return ShapeRange(least, self.shapes[0], most)

    def _bound(self, name: str, choose: Any) -> Shape:
        return tuple(choose(sizes) for sizes in zip(*(shapes[name] for shapes in self.shapes), strict=True))


def _observe(pipe: Any, lazy: LazyModule, calls: Sequence[Mapping[str, Any]]) -> _Seen:
    """
    Raises:
        ConfigError: there is no call, one does not reach the denoiser, or they differ in more than sizes.
    """
    seen = _Seen()
    parameters = inspect.signature(type(pipe).__call__).parameters
    few = {"num_inference_steps": 1, "output_type": "latent"}
    with _watched(lazy, seen), without_progress_bar(pipe), torch.random.fork_rng():
        for call in calls:
            before = len(seen.shapes)
            pipe(**{**{name: value for name, value in few.items() if name in parameters}, **call})
            if len(seen.shapes) == before:
                raise ConfigError(
                    f"{type(pipe).__name__} does not call this denoiser in {sorted(call)}; give a call that does"
                )
    if not seen.shapes:
        raise ConfigError("calls is empty; give the arguments of a call of the pipeline")
    forms = {tuple((name, len(shape)) for name, shape in shapes.items()) for shapes in seen.shapes}
    if len(forms) > 1:
        raise ConfigError(
            f"the calls differ in more than sizes: {sorted({name for form in forms for name, _ in form})} are not the "
            "inputs of all of them; export one file for each kind of call"
        )
    return seen


@contextmanager
def _watched(model: nn.Module, seen: _Seen) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = call_by_name(model, args, kwargs)
        seen.example = seen.example or call
        layout, tensors = CallLayout.of((), call)
        seen.shapes.append({name: tuple(tensor.shape) for name, tensor in zip(layout.names, tensors, strict=True)})

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
