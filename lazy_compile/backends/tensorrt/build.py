"""Building an engine: read, check, build, look at what came out, and only then write it under its name."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lazy_compile.backends.onnx.masks import ScheduleVariants
from lazy_compile.backends.onnx.metadata import BATCH, first_line
from lazy_compile.backends.onnx.prologue import prologue_path
from lazy_compile.backends.onnx.save import put_in_place
from lazy_compile.backends.onnx.structure import heavy_nodes
from lazy_compile.backends.tensorrt.api import Flavor, Message, flavor_of, load, record
from lazy_compile.backends.tensorrt.check import EngineStructure, check_branches
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.layers import parse_profiles
from lazy_compile.backends.tensorrt.network import configure, parse_network, serialize
from lazy_compile.backends.tensorrt.profile import (
    Profile,
    SizeRange,
    fixed_sizes,
    free_sizes,
    size_ranges,
    spelled_ranges,
)
from lazy_compile.backends.tensorrt.shared_sizes import with_shared_sizes
from lazy_compile.backends.tensorrt.sidecar import EngineSidecar, path_beside, waiting_path
from lazy_compile.backends.tensorrt.source import OnnxSource
from lazy_compile.digests import digest_of, verification
from lazy_compile.errors import ArtifactError, BackendError, ConfigError, import_optional
from lazy_compile.policies.policy import AlwaysCompute, Policy, Scheduled
from lazy_compile.policies.serialize import to_json
from lazy_compile.progress import OnProgress, no_progress
from lazy_compile.storage import atomic_path, locked_folder, remove_files, superseding

logger = logging.getLogger("lazy_compile")


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        path: the engine; its description stands beside it, see :class:`EngineSidecar`.
        flavor: TensorRT or TensorRT-RTX, and its version.
        bytes: size of the engine.
        structure: where its kernels stand.
        skipped: whether the engine was there already, made from the same file with the same options.
        seconds: how long it took.
        policy: what its runner follows unless told otherwise, in words.
        prologue: what was built of the prologue; None if there is none.
        sizes: the free sizes of the file that the engine serves, such as ``"batch=1..8, height=32"``; empty if there
            are none.
    """

    path: Path
    flavor: str
    bytes: int
    structure: EngineStructure
    skipped: bool
    seconds: float
    policy: str = ""
    prologue: BuildReport | None = None
    sizes: str = ""


def build_engine(
    onnx: str | Path,
    engine: str | Path,
    config: BuildConfig | None = None,
    *,
    policy: Policy | None = None,
    on_progress: OnProgress = no_progress,
) -> BuildReport:
    """Build a TensorRT engine from an ONNX file, in which every ``If`` is a jump over the kernels of its branch.

    An engine that was made from the same file with the same options by the same builder is left as it is. The prologue
    of a model becomes an engine beside it: ``m.prologue.engine`` beside ``m.engine``.

    Args:
        onnx: what ``export_onnx`` wrote; any other ONNX model is built too.
        engine: where to write. The file appears when it is complete and checked.
        config: all options.
        policy: the rule that a runner of this engine follows unless told otherwise; None takes the one that the file
            carries, and without any computes everything.
        on_progress: called as the builder's phases go on.

    Raises:
        ArtifactError: the ONNX file or its prologue cannot be read, or the engine not written.
        BackendError: the builder refuses, or the engine has not one jump for each ``If``.
        ConfigError: the options contradict each other or the file.
        MissingDependencyError: that flavor of TensorRT is not installed.
    """
    source, target, config = OnnxSource.read(onnx), Path(engine), config or BuildConfig()
    prologue = source.read_prologue()
    ranges = size_ranges(source.dims, source.model, config.profiles, source.example)
    policy = policy or _policy_of(source)
    while True:
        made = _make(source, target, config, ranges, policy, on_progress)
        beside = None
        if prologue is not None:
            beside = _make_prologue(prologue, source, target, config, ranges, on_progress)
        with locked_folder(target.parent):
            if not made.is_current() or (beside is not None and not beside.is_current()):
                continue  # another process has put another engine in the place of one that could stay
            if prologue is None or beside is None:
                return made.write()
            with beside.at_hand(prologue.prologue) as waiting, superseding(target, waiting):
                report = made.write()
                return replace(report, prologue=beside.write())


@dataclass(frozen=True)
class _Made:
    """An engine that is not written yet.

    Attributes:
        plan: its content; None if it was there already.
    """

    target: Path
    title: str
    plan: Any
    sidecar: EngineSidecar
    structure: EngineStructure
    seconds: float
    policy: str
    sizes: str

    def is_current(self) -> bool:
        """Whether the engine need not be built again: it is here, or still there."""
        return self.plan is not None or _finished(self.target, self.sidecar.key) is not None

    def write(self) -> BuildReport:
        beside, waiting = path_beside(self.target), waiting_path(self.target, self.sidecar.content)
        if self.plan is not None or waiting.is_file():
            with locked_folder(self.target.parent), superseding(beside, (), [waiting.name]):
                if self.plan is not None:
                    self._write_engine(waiting)
                put_in_place(waiting, beside)
        size, skipped = self.target.stat().st_size, self.plan is None
        return BuildReport(
            self.target, self.title, size, self.structure, skipped, self.seconds, self.policy, sizes=self.sizes
        )

    def _write_engine(self, waiting: Path) -> None:
        try:
            with atomic_path(self.target) as temporary:
                self.sidecar.save(self.target, waiting)
                temporary.write_bytes(self.plan)
        except BaseException:
            waiting.unlink(missing_ok=True)
            raise
        for problem in self.structure.problems:
            logger.warning("%s is right but not as lazy as it could be: %s", self.target, problem)

    @contextmanager
    def at_hand(self, digest: str) -> Iterator[list[str]]:
        """While a model takes the place of an older one, its prologue lies where the older model does not look.

        Args:
            digest: by which the model knows its prologue.

        Yields:
            Names of the files there; they are useless once the prologue stands in its own place.
        """
        held = self.target.with_name(f".{self.target.stem}.{digest[:16]}{self.target.suffix}")
        names = [held.name, path_beside(held).name]
        if self.plan is None:  # it is the one of the older model
            yield names
            return
        try:
            replace(self, target=held).write()
            yield names
        except BaseException:
            remove_files(held.parent, names)
            raise


def _policy_of(source: OnnxSource) -> Policy:
    """What the file says."""
    policy = None if source.model is None else source.model.read_policy()
    if source.model is not None and policy is None:
        logger.warning(
            "%s carries no policy, as files of earlier releases do not: its engine computes every branch unless its "
            "runner is given one", source.path,
        )  # fmt: skip
    return policy or AlwaysCompute()


def _make(
    source: OnnxSource,
    target: Path,
    config: BuildConfig,
    ranges: Sequence[SizeRange],
    policy: Policy,
    on_progress: OnProgress,
) -> _Made:
    """One engine of one file."""
    start = time.perf_counter()
    flavor, trt, device = builder_for(config)
    version, title = str(trt.__version__), f"{flavor.title} {trt.__version__}"
    if not (policy.known_before_step or policy.reads_gates):
        raise ConfigError(
            f"an engine cannot follow {type(policy).__name__}, which decides by the activations in a branch; use a "
            "policy that defines decisions(), such as Scheduled(...)"
        )
    profiles = [sizes.profile(source.dims) for sizes in ranges]
    key = _key(source, config, profiles, policy, version, device)
    if (known := _finished(target, key)) is not None:
        seconds = time.perf_counter() - start
        return _Made(target, title, None, known, known.structure(), seconds, policy.describe(), spelled_ranges(ranges))
    if source.model is not None:
        policy.check(source.model.branches)
    with record(trt) as messages, tempfile.TemporaryDirectory() as folder:
        path = _sanitized(source, Path(folder)) if config.sanitize else source.path
        model = None
        if source.model is not None and free_sizes(ranges) - {BATCH}:
            model = with_shared_sizes(path, source.model)
        network = parse_network(trt, flavor, path, messages, model)
        settings = configure(network, config, profiles, _timing_cache(config))
        plan = serialize(network, settings, messages, on_progress)
        structure = _structure(messages, source.nodes)
        tensors = network.tensors(profiles)
        _keep_timing_cache(config, settings)
    metadata = None if source.model is None else source.model.at_sizes(fixed_sizes(ranges))
    sidecar = EngineSidecar(
        flavor.name, version, device, key, digest_of(plan), config.options(), tensors, metadata, source.prologue,
        to_json(policy), source.nodes, structure.layers,
    )  # fmt: skip
    logger.info("%s: %s", target, policy.describe())
    seconds = time.perf_counter() - start
    return _Made(target, title, plan, sidecar, structure, seconds, policy.describe(), spelled_ranges(ranges))


def _make_prologue(
    prologue: OnnxSource,
    source: OnnxSource,
    target: Path,
    config: BuildConfig,
    ranges: Sequence[SizeRange],
    on_progress: OnProgress,
) -> _Made:
    """The engine of the prologue of ``source``, beside ``target``, for the same sizes."""
    assert source.model is not None
    path = prologue_path(target, source.model.gating)
    return _make(prologue, path, config, ranges, AlwaysCompute(), on_progress)


def builder_for(config: BuildConfig) -> tuple[Flavor, ModuleType, str]:
    """The flavor, its package, and the GPU that an engine will be tied to, empty if to none; quick to ask.

    Raises:
        BackendError: there is no GPU where one is needed, or the package cannot be used.
        MissingDependencyError: it is not installed.
    """
    flavor = flavor_of(config.flavor)
    trt = load(flavor)
    if flavor.builds_without_gpu and "CURRENT" not in config.compute_capabilities:
        if config.refit and not torch.cuda.is_available():
            raise BackendError(
                f"{flavor.title} builds an engine that can be refitted on a GPU only, and PyTorch sees none here; "
                "build it where one is, or write other weights into the file with replace_weights() and build again"
            )
        return flavor, trt, ""
    if not torch.cuda.is_available():
        raise BackendError(
            f"{flavor.title} builds for the GPU at hand, and PyTorch sees none here; build on the machine that will "
            "run the engine, or use flavor='rtx', which needs no GPU"
        )
    return flavor, trt, torch.cuda.get_device_name()


def build_engines(
    onnx: str | Path, engines: str | Path, config: BuildConfig | None = None, *, on_progress: OnProgress = no_progress
) -> list[BuildReport]:
    """Build an engine for each model of a folder that ``export_onnx(gating="schedule")`` wrote, into another folder.

    Every engine holds the weights that its own step needs, so together they hold those of shared branches several
    times, on disk and on the GPU; what they do not hold twice is an engine: equal rows of the schedule share one. They
    share the engine of their prologue too, which the first report has.

    Raises:
        ArtifactError: the folder holds no such set, or see :func:`build_engine`.
    """
    masks = ScheduleVariants.load(onnx)
    config, reports = config or BuildConfig(), []
    first = OnnxSource.read(next(iter(masks.files.values())))
    policy = (first.model.read_policy() if first.model is not None else None) or Scheduled(masks.schedule)
    prologue = first.read_prologue()
    ranges = size_ranges(first.dims, first.model, config.profiles, first.example)
    # The same set under the same name is not built again; another set lies beside this one until it is complete.
    _, trt, device = builder_for(config)
    sources = {mask: OnnxSource.read(file) for mask, file in masks.files.items()}
    version = str(trt.__version__)
    keys = [
        _key(source, config, [sizes.profile(source.dims) for sizes in ranges], policy, version, device)
        for source in sources.values()
    ]
    result = ScheduleVariants.of(masks.schedule, Path(engines), ".engine", digest_of("".join(keys).encode())[:8])
    with locked_folder(Path(engines)):
        for mask, source in sources.items():
            reports.append(_make(source, result.files[mask], config, ranges, policy, on_progress).write())
        if prologue is None:
            result.save(Path(engines))
            return reports
        beside = _make_prologue(prologue, first, reports[0].path, config, ranges, on_progress)
        with beside.at_hand(prologue.prologue) as waiting:
            result.save(Path(engines), [beside.target.name, waiting[0]])
            reports[0] = replace(reports[0], prologue=beside.write())
            remove_files(Path(engines), waiting)
    return reports


def _key(
    source: OnnxSource,
    config: BuildConfig,
    profiles: Sequence[Profile],
    policy: Policy,
    version: str,
    device: str,
) -> str:
    """All that an engine and its description depend on, in one digest."""
    values = [source.content, config.flavor, config.options(), profiles, to_json(policy), version, device]
    return digest_of(json.dumps(values, sort_keys=True).encode())


def _finished(target: Path, key: str) -> EngineSidecar | None:
    """The description of an engine that is there, whole, and made from the same."""
    try:
        sidecar = EngineSidecar.load(target)
        if sidecar.key != key:
            return None
        sidecar.check_file(target)
    except ArtifactError:
        return None
    return sidecar


def _structure(messages: list[Message], nodes: dict[str, tuple[str, ...]]) -> EngineStructure:
    """That of the first profile; the others are held against the model too."""
    listed = [message.text for message in messages if "LayerType: " in message.text]
    profiles = [layers for text in listed or [""] for layers in parse_profiles(text)]
    structures = [check_branches(layers, len(nodes) - 1, nodes) for layers in profiles]
    for structure in structures:
        if len(structure.branches) != len(nodes) - 1:
            raise BackendError(f"the engine is not lazy: {structure.problems[0]}; nothing was written")
    return next((structure for structure in structures if structure.problems), structures[0])


def _sanitized(source: OnnxSource, folder: Path) -> Path:
    """What Polygraphy makes of a model; the model itself if its conditionals no longer hold the same."""
    loaders = import_optional("polygraphy.backend.onnx", "tensorrt-rtx")
    result = folder / source.path.name
    try:
        folded = loaders.fold_constants(
            loaders.onnx_from_path(str(source.path)), allow_onnxruntime_shape_inference=False
        )
        loaders.save_onnx(folded, str(result), external_data_path=f"{source.path.name}.data")
    except Exception as error:
        logger.warning("Polygraphy cannot fold constants here and was left out: %s", first_line(error))
        return source.path
    with verification(False):  # Polygraphy writes no digest
        nodes = heavy_nodes(result)
    if nodes != source.nodes:
        logger.warning("Polygraphy moved operators of a branch; its result was left out")
        return source.path
    return result


def _timing_cache(config: BuildConfig) -> bytes:
    try:
        return b"" if config.timing_cache is None else Path(config.timing_cache).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArtifactError(f"cannot read the timing cache {config.timing_cache}: {error.strerror}") from error


def _keep_timing_cache(config: BuildConfig, settings: Any) -> None:
    if config.timing_cache is not None and (cache := settings.get_timing_cache()) is not None:
        with atomic_path(config.timing_cache) as temporary:
            temporary.write_bytes(cache.serialize())
