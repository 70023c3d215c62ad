"""What the command line is given by name: models, example inputs, samplers, options."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from lazy_compile.errors import ArtifactError, ConfigError, one_line, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lazy_compile.config import Group, LazyConfig
    from lazy_compile.runtime.module import LazyModule

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

LARGEST_INPUT = 2**34
"""Elements of one example input; more is a slip of the finger."""

FLOW_MATCHING = (
    "AuraFlow", "Bria", "Chroma", "CogView4", "EasyAnimate", "Flux", "HiDream", "HunyuanImage", "HunyuanVideo",
    "Kandinsky5", "LTX", "Lumina", "Mochi", "OmniGen", "QwenImage", "SD3", "Sana", "Wan", "ZImage",
)  # fmt: skip
"""How the names of diffusers' flow-matching models begin."""

NOISE_PREDICTING = (
    "Allegro", "CogVideoX", "ConsisID", "DiT", "HunyuanDiT", "I2VGen", "Latte", "PixArt", "Transformer2D", "UNet",
)  # fmt: skip
"""How those begin that DDIM samples."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""How the Hub names a repository."""

Sampler = Callable[[Any, int], "Tensor"]


@dataclass(frozen=True)
class NamedModel:
    """A model and the arguments of one call.

    Attributes:
        spec: how it was named on the command line.
        model: the module, on its device.
        example_inputs: arguments by name; empty where none are known.
        scheduler_folder: the pipeline's own scheduler, where there is one.
    """

    spec: str
    model: nn.Module
    example_inputs: dict[str, Any] = field(default_factory=dict)
    scheduler_folder: Path | None = None


def load_model(spec: str, shapes: Sequence[str] = (), device: str = "cpu") -> NamedModel:
    """``package.module:factory``, a diffusers folder (``dir`` or ``dir#subfolder``), the ``owner/name`` of a repository
    of the Hub (with ``#subfolder`` too), or a ``.pt2`` file.

    Args:
        spec: the model.
        shapes: ``name:2x4x32x32``, as trtexec takes them, with an optional dtype behind: ``labels:2:int64``.
        device: where the model and its inputs go.

    Raises:
        ConfigError: the name leads nowhere, or the example inputs are missing or not the model's.
        ArtifactError: the folder or file is damaged.
    """
    announce(f"importing {spec}")
    import torch
    from torch.utils import _pytree as pytree

    folder, _, subfolder = spec.partition("#")
    if spec.endswith(".pt2"):
        named = _load_exported(spec)
    elif Path(folder).is_dir():
        named = _load_folder(spec, Path(folder), subfolder)
    elif HUB_NAME.fullmatch(folder):
        from lazy_compile.integrations.diffusers import download_denoiser

        announce(f"looking for {folder} in the cache of the Hub, and on the Hub")
        named = _load_folder(spec, *download_denoiser(folder, subfolder))
    elif ":" in spec:
        named = _call_factory(spec)
    else:
        raise ConfigError(
            f"{shown(spec, 80)} is neither a folder nor a .pt2 file nor package.module:factory nor owner/name of the "
            "Hub; give one of these as MODEL"
        )
    try:
        target = torch.device(device)
        model = named.model.to(target) if target.type != "cpu" else named.model
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {shown(device, 40)} cannot be used ({shown(error)}); try --device cpu") from None
    inputs = _example_inputs(named, shapes)
    inputs = pytree.tree_map(lambda leaf: leaf.to(target) if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return NamedModel(spec, model, inputs, named.scheduler_folder)


def require_inputs(named: NamedModel) -> dict[str, Any]:
    """The example inputs, or one line that says which arguments the model takes."""
    if named.example_inputs:
        return named.example_inputs
    arguments = ", ".join(
        name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in _parameters(named.model).items()
    )
    raise ConfigError(
        f"{named.spec} comes without example inputs; its forward takes ({arguments}): "
        "give --shape NAME:2x4x32x32 for each tensor it needs"
    )


def in_precision(named: NamedModel, precision: str | None) -> NamedModel:
    """All of the model and its floating example inputs in ``"fp32"``, ``"fp16"`` or ``"bf16"``; None leaves them."""
    import torch
    from torch import nn
    from torch.utils import _pytree as pytree

    if precision is None:
        return named
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    model = nn.Module.to(named.model, dtype)  # not the model's own, which may leave some in float32
    return replace(named, model=model, example_inputs=pytree.tree_map(cast, named.example_inputs))


def parse_group(text: str | None) -> Group | None:
    """``"2"`` or ``"block"``."""
    if text is None:
        return None
    if text == "block":
        return "block"
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise ConfigError(f"--group is {shown(text)}; expected a number of branches, or block")
    return int(text)


def load_lazy(
    named: NamedModel, gates: Path | None, options: Sequence[str], capture_cache: Path | None = None
) -> LazyModule:
    """The model made lazy and captured, with the options of the command line or those of an artefact."""
    from lazy_compile.compiler import load, transform
    from lazy_compile.progress import working

    inputs = require_inputs(named)
    if gates is not None and options:
        raise ConfigError(f"--set {options[0]} and --gates exclude each other: the artefact carries its options")
    with working(f"capturing {named.spec}"):
        if gates is not None:
            result: LazyModule = load(gates, named.model, inputs, capture_cache=capture_cache)
            return result
        return transform(named.model, inputs, parse_options(options), capture_cache=capture_cache)


def load_sampler(
    spec: str | None, named: NamedModel, lazy: LazyModule, steps: int | None, scheduler: str | None = None
) -> Sampler:
    """What ``package.module:factory`` returns, else a diffusers scheduler around the example inputs."""
    if spec is None:
        from lazy_compile.integrations.diffusers import SchedulerSampler

        return SchedulerSampler(
            choose_scheduler(named, scheduler),
            require_inputs(named),
            steps=20 if steps is None else steps,
            timestep_argument=lazy.graph.timestep_input,
        )
    factory = find_function(spec)
    if steps is not None and "steps" not in inspect.signature(factory).parameters:
        raise ConfigError(f"{spec} takes no argument 'steps'; leave out --steps {steps}, or let the factory take it")
    sampler = factory() if steps is None else factory(steps=steps)
    if not callable(sampler):
        raise ConfigError(f"{spec} returned {type(sampler).__name__}; expected a function sample(denoiser, seed)")
    return sampler  # type: ignore[no-any-return]


def choose_scheduler(named: NamedModel, name: str | None) -> Any:
    """The scheduler of that name; else the one in the model's own folder, or that its class was trained for.

    Raises:
        ConfigError: it is not known, or the one named does not fit what the model predicts.
    """
    from lazy_compile.integrations.diffusers import make_scheduler

    kind = type(named.model)
    known = kind.__name__ if kind.__module__.startswith("diffusers.") else ""
    if name is not None:
        if known.startswith(FLOW_MATCHING) and name == "ddim":
            raise ConfigError(
                f"{known} predicts a velocity, which DDIM takes for noise; leave --scheduler out, or give flow-match"
            )
        return make_scheduler(name)
    if named.scheduler_folder is not None:
        return make_scheduler("", named.scheduler_folder)
    if known and not known.startswith((*FLOW_MATCHING, *NOISE_PREDICTING)):
        raise ConfigError(
            f"how {known} is sampled is not known here, and another scheduler gives nothing like its samples; give "
            "--scheduler ddim or flow-match, a --sampler, or the pipeline's folder with --prompts"
        )
    if known.startswith(FLOW_MATCHING):
        announce(f"sampling with flow-match, which {kind.__name__} was trained for")
        return make_scheduler("flow-match")
    announce("sampling with ddim: the model does not say; else give --scheduler flow-match, or a --sampler")
    return make_scheduler("ddim")


def parse_options(options: Sequence[str]) -> LazyConfig:
    """``("reuse=last", "max_reuse_age=3")`` as a :class:`LazyConfig`."""
    from lazy_compile.config import LazyConfig

    hints = get_type_hints(LazyConfig)
    values: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or name not in hints:
            known = ", ".join(item.name for item in fields(LazyConfig))
            raise ConfigError(f"--set {shown(option, 30)} is not NAME=VALUE with a known name; the names are {known}")
        values[name] = _parse_value(text, hints[name], option)
    return LazyConfig.from_dict(values)


def _parse_value(text: str, hint: Any, option: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(text in get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        return text
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"--set {one_line(option)}: expected true or false")
        return text.lower() == "true"
    if int in kinds:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"--set {one_line(option)}: expected a whole number") from None
    return text


def announce(text: str) -> None:
    """On standard error, at once: what is about to take seconds."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class FolderModules(MetaPathFinder):
    """Finds modules in a folder, after all that is installed; its subfolders hide nothing.

    Attributes:
        folder: where modules lie.
        named: the one module that may also be a folder without ``__init__.py``. Any other such folder is none: a model
            repository called ``triton`` would be taken for the package, by PyTorch too.
    """

    folder: Path
    named: str

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is not None:
            return None
        found = PathFinder.find_spec(fullname, [str(self.folder)], target)
        return found if found is not None and (found.loader is not None or fullname == self.named) else None


def find_function(spec: str) -> Callable[..., Any]:
    module_name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"{shown(spec)} names no module; expected package.module:function")
    sys.meta_path.append(FolderModules(Path.cwd(), module_name.split(".")[0]))
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"there is no module {shown(error.name, 60)} (from {shown(spec, 60)}); run from the folder that "
            "holds it, or install it"
        ) from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            where = getattr(found, "__file__", None)
            raise ConfigError(
                f"{one_line(module_name, 60)} has no {shown(attribute, 60)} (it is {where}); name a function in it as "
                f"{one_line(module_name, 60)}:function"
            )
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(
            f"{one_line(spec)} is {type(found).__name__}, not a function; name one that returns the model"
        )
    return found  # type: ignore[no-any-return]


def _call_factory(spec: str) -> NamedModel:
    from torch import nn

    made = find_function(spec)()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module) or not isinstance(inputs, Mapping):
        raise ConfigError(
            f"{spec} returned {type(made).__name__}; expected a torch.nn.Module, or (module, {{name: example input}})"
        )
    return NamedModel(spec, model, dict(inputs))


def _load_folder(spec: str, folder: Path, subfolder: str) -> NamedModel:
    from lazy_compile.integrations.diffusers import load_denoiser

    scheduler = folder / "scheduler"
    return NamedModel(spec, load_denoiser(folder / subfolder), {}, scheduler if scheduler.is_dir() else None)


def _load_exported(spec: str) -> NamedModel:
    from lazy_compile.capture.exported_file import load_exported

    if not Path(spec).exists():
        raise ArtifactError(f"there is no file {spec}; expected one that torch.export.save wrote")
    exported = load_exported(Path(spec))
    model = exported.module()
    inputs: dict[str, Any] = {}
    if exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
        inputs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    return NamedModel(spec, model, inputs)


def _example_inputs(named: NamedModel, shapes: Sequence[str]) -> dict[str, Any]:
    import torch

    parameters = _parameters(named.model)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    floating = next((p.dtype for p in named.model.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = dict(named.example_inputs)
    for text in (part for shape in shapes for part in shape.split(",")):
        name, sizes, dtype = _parse_shape(text)
        if name not in parameters and not takes_any:
            raise ConfigError(
                f"--shape {one_line(text, 60)}: forward has no argument {shown(name, 60)}; it takes "
                f"({', '.join(parameters)})"
            )
        known = inputs.get(name)
        kind = dtype or (known.dtype if isinstance(known, torch.Tensor) else floating)
        if kind.is_floating_point:
            inputs[name] = torch.randn(sizes, generator=generator).to(kind)
        else:
            inputs[name] = torch.randint(0, 2, sizes, generator=generator).to(kind)
    return inputs


def _parse_shape(text: str) -> tuple[str, tuple[int, ...], Any]:
    import torch

    name, _, rest = text.partition(":")
    sizes_text, _, dtype_name = rest.partition(":")
    dtype = getattr(torch, dtype_name) if dtype_name in _DTYPES else None
    sizes = () if sizes_text == "scalar" else tuple(sizes_text.split("x"))
    short = all(size.isdecimal() and len(size) < 12 for size in sizes)
    if not name or not short or (dtype_name and dtype is None):
        raise ConfigError(f"--shape {shown(text)} is not NAME:2x4x32x32, or with a dtype NAME:2:int64, or NAME:scalar")
    shape = tuple(map(int, sizes))
    if prod(shape) > LARGEST_INPUT:
        raise ConfigError(f"--shape {shown(text)} has {prod(shape):.1e} elements; expected {LARGEST_INPUT:.1e} at most")
    return name, shape, dtype


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
