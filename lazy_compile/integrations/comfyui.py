"""ComfyUI: a MODEL that is lazy while it samples, by ComfyUI's own wrappers; the nodes are in ``examples/comfyui``.

>>> patched = patch(model, "balanced")  # a clone of a ModelPatcher; sampled as before  # doctest: +SKIP
>>> state_of(patched).report            # of the latest sampling                        # doctest: +SKIP
>>> unpatch(patched)                    # a clone without it                            # doctest: +SKIP

The wrappers are ``outer_sample``, around one run of a sampler, and ``apply_model``, around one call of the diffusion
model. Rows are distinguished by what ComfyUI says of them: the ``uuid`` of their conditioning, their context window,
and their place in the batch.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lazy_compile.capture.comparison import TOLERANCE
from lazy_compile.config import LazyConfig
from lazy_compile.errors import CaptureError, ConfigError, NoBranchError, shown
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.presets import PRESETS, PolicyLike, as_policy
from lazy_compile.runtime.artifact import read
from lazy_compile.runtime.lazy_graph import LazyGraph
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.sampling import DenseStep
from lazy_compile.storage import is_folder

logger = logging.getLogger("lazy_compile")

KEY = "lazy_compile"
"""The key of the wrappers and of the attachment."""

PER_CALL = frozenset({"uuids", "sigmas", "sample_sigmas", "cond_or_uncond", "context_window"})
"""Keys of ``transformer_options`` that are other ones at every call, so that no graph may depend on them."""

_NOT_READ = frozenset({"callbacks", "wrappers"})


@dataclass(frozen=True)
class StepMask(Policy, kind="step_mask"):
    """Which calls of a trajectory compute: ``"1"`` all branches, ``"0"`` none; calls after the last compute.

    Attributes:
        mask: one digit a call, ``"1111010101"``; the first is a 1.

    Raises:
        ConfigError: it is not of this form.
    """

    mask: str

    per_branch = False

    def __post_init__(self) -> None:
        if not self.mask.startswith("1") or set(self.mask) - {"0", "1"}:
            raise ConfigError(f"the mask of steps is {shown(self.mask)}; expected digits 1 and 0 that begin with 1")

    def decisions(self, step: int, timestep: float, before: float | None, memory: dict[str, object]) -> bool:
        return step >= len(self.mask) or self.mask[step] == "1"

    def describe(self) -> str:
        return f"{self.mask.count('1')} of the first {len(self.mask)} calls of a trajectory compute"


def policy_of(text: str) -> PolicyLike:
    """A preset by name, a mask of steps (spaces and commas are ignored), or a folder that ``lazy-compile plan`` wrote.

    Raises:
        ConfigError: it is none of these.
        ArtifactError: the folder is damaged.
    """
    mask = text.replace(" ", "").replace(",", "")
    if text in PRESETS:
        return as_policy(text)
    if mask and not set(mask) - {"0", "1"}:
        return StepMask(mask)
    if text.strip() and is_folder(text):
        return read(text).policy
    raise ConfigError(
        f"the schedule is {shown(text)}; expected {', '.join(PRESETS)}, a mask such as 1111010101, or the folder that "
        "lazy-compile plan wrote"
    )


def patch(model: Any, policy: PolicyLike, config: LazyConfig | None = None) -> Any:
    """A clone of a ``ModelPatcher`` whose diffusion model is lazy while it samples; the one given stays as it is.

    Raises:
        ConfigError: this is no ModelPatcher with wrappers, or an option is not of the expected form.
    """
    _require_patcher(model)
    patched = unpatch(model)
    state = LazyState(as_policy(policy), config or LazyConfig())
    patched.add_wrapper_with_key("outer_sample", KEY, state.around_sampling)
    patched.add_wrapper_with_key("apply_model", KEY, state.around_call)
    patched.set_attachments(KEY, state)
    return patched


def unpatch(model: Any) -> Any:
    """A clone without the wrappers of :func:`patch`."""
    _require_patcher(model)
    result = model.clone()
    for kind in ("outer_sample", "apply_model"):
        result.remove_wrappers_with_key(kind, KEY)
    result.remove_attachments(KEY)
    return result


def state_of(model: Any) -> LazyState | None:
    """What :func:`patch` has attached; None if nothing is."""
    _require_patcher(model)
    found: LazyState | None = model.get_attachment(KEY)
    return found


def _require_patcher(model: Any) -> None:
    needed = ("clone", "add_wrapper_with_key", "remove_wrappers_with_key", "set_attachments", "get_attachment")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"expected ComfyUI's ModelPatcher; {type(model).__name__} has no {missing[0]}(): update ComfyUI, or "
            "connect the MODEL of a loader"
        )


class LazyState:
    """One lazy diffusion model, shared by all clones of the ModelPatcher that it was attached to.

    Attributes:
        report: one line about the latest sampling.
        dense_because: why the latest calls ran the diffusion model as it is; empty if they did not.
        lazy: the lazy model; None before the first call.
    """

    def __init__(self, policy: Policy, config: LazyConfig) -> None:
        self.config = config
        self._policy = policy
        self.report = "lazy_compile: nothing was sampled yet"
        self.dense_because = ""
        self.lazy: LazyModule | None = None
        self._made_for: tuple[Any, ...] = ()
        self._checked: list[weakref.ref[LazyGraph]] = []
        self._refused: dict[tuple[Any, ...], str] = {}
        self._calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyState:
        return self

    @property
    def policy(self) -> Policy:
        """The rule that decides, of the next samplings too; it may be set at any time."""
        return self._policy

    @policy.setter
    def policy(self, given: PolicyLike) -> None:
        self._policy = as_policy(given)
        if self.lazy is not None:
            self.lazy.policy = self._policy

    # Wrappers -----------------------------------------------------------------------------------------------------

    def around_sampling(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``outer_sample``: statistics and caches are those of one run of a sampler."""
        self._calls, self.dense_because = 0, ""
        if self.lazy is not None:
            self.lazy.reset()
            self.lazy.reset_stats()
        try:
            return executor(*args, **kwargs)
        finally:
            self.report = self._summary()
            logger.info(self.report)
            if self.lazy is not None:
                self.lazy.reset()

    def around_call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """``apply_model``: a lazy model stands in the place of the diffusion model for this call."""
        base = executor.class_obj
        dense = base.diffusion_model
        stand_in, calls = _StandIn(dense, base, self), self._calls
        base.diffusion_model = stand_in
        try:
            result = executor(*args, **kwargs)
        finally:
            base.diffusion_model = dense
        if self._calls == calls:
            self._run_dense("another patch runs the diffusion model in its place; put Lazy Compile after it")
        return result

    # One call of the diffusion model --------------------------------------------------------------------------------

    def call(self, dense: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the diffusion model returns, computed lazily where that is possible."""
        self._calls += 1
        options: dict[str, Any] = kwargs.get("transformer_options") or {}
        rest = {name: value for name, value in kwargs.items() if name != "transformer_options"}
        tensors = [leaf for leaf in pytree.tree_leaves((args, rest)) if isinstance(leaf, Tensor)]
        try:
            lazy = self._lazy_for(dense, base, _fixed_options(options))
            self._admit(lazy, tensors, args, rest, lambda: dense(*args, **kwargs))
        except (CaptureError, NoBranchError) as error:
            self._run_dense(str(error))
            return dense(*args, **kwargs)
        if (keys := _row_keys(options, len(tensors[0]))) is None:
            return lazy(*args, **rest)
        with lazy.trajectory(keys):
            return lazy(*args, **rest)

    def _admit(
        self,
        lazy: LazyModule,
        tensors: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run_dense: Callable[[], Any],
    ) -> None:
        """
        Raises:
            CaptureError: calls of this kind cannot be captured, or their graph is not the diffusion model.
            NoBranchError: there is nothing to gate in it.
        """
        kind = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if kind in self._refused:
            raise CaptureError(self._refused[kind])
        try:
            graph = lazy.capture(*args, **kwargs)
            self._checked = [known for known in self._checked if known() is not None]
            if not any(known() is graph for known in self._checked):
                _compare(lazy.evaluate(DenseStep(), *args, **kwargs), run_dense())
                self._checked.append(weakref.ref(graph))
        except (CaptureError, NoBranchError) as error:
            self._refused[kind] = str(error)
            raise

    def _lazy_for(self, dense: nn.Module, base: nn.Module, options: dict[str, Any]) -> LazyModule:
        """Made anew for another model or other options, and for weights that are patched while they are used."""
        model = getattr(dense, "_orig_mod", dense)  # of torch.compile, whose graph cannot be captured again
        patched_in_use = getattr(base, "current_weight_patches_uuid", None) if _is_low_vram(base) else None
        made_for = (id(model), options, patched_in_use)
        if self.lazy is None or made_for != self._made_for:
            # Kept along a trajectory, the cast weights would all be on the GPU at once.
            config = replace(self.config, hoist_step_invariants=False) if _is_low_vram(base) else self.config
            self.lazy = LazyModule(DiffusionModel(model, options), config)
            self.lazy.policy = self.policy
            self._made_for, self._checked, self._refused = made_for, [], {}
        return self.lazy

    # Words --------------------------------------------------------------------------------------------------------

    def _run_dense(self, reason: str) -> None:
        if reason != self.dense_because:
            logger.warning("lazy_compile: the diffusion model runs as it is: %s", reason)
        self.dense_because = reason

    def _summary(self) -> str:
        if self.dense_because:
            return f"lazy_compile: nothing was reused: {self.dense_because}"
        if self.lazy is None or not self.lazy.is_captured:
            return "lazy_compile: the diffusion model was not called"
        stats = self.lazy.stats
        return (
            f"lazy_compile: {stats.lazy_ratio:.0%} of the evaluations of {len(self.lazy.branches)} branches reused, "
            f"{stats.compute_ratio:.0%} of the MACs computed, caches of {self.lazy.cache_bytes / 2**20:.1f} MiB "
            f"(freed), {stats.calls} calls"
        )


class _StandIn(nn.Module):
    """What ComfyUI calls in the place of the diffusion model; its other attributes are those of the original."""

    def __init__(self, dense: nn.Module, base: nn.Module, state: LazyState) -> None:
        super().__init__()
        self.dense = dense
        self.__dict__.update(_base=base, _state=state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._state.call(self.dense, self._base, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("dense"), name)


class DiffusionModel(nn.Module):
    """The diffusion model with the options that are the same in every call of one graph."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._options = options

    def forward(self, x: Any, timestep: Tensor, context: Any = None, **kwargs: Any) -> Any:
        options = _FixedOptions(self._options)
        return self.model(x, timestep, context=context, transformer_options=options, **kwargs)


class _FixedOptions(dict[str, Any]):
    """Says so where a model reads what is another at every call."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(_allowed(key), default)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(_allowed(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_allowed(key))

    def copy(self) -> _FixedOptions:
        return _FixedOptions(self)


def _allowed(key: Any) -> Any:
    if key in PER_CALL:
        raise CaptureError(f"it reads transformer_options[{key!r}], which no graph can follow")
    return key


def _fixed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a graph may hold.

    Raises:
        CaptureError: a patch runs inside the diffusion model, and may do something else at every call.
    """
    wrappers = options.get("wrappers", {}).get("diffusion_model", {})
    if any(wrappers.values()):
        raise CaptureError(f"the patch {shown(next(key for key, found in wrappers.items() if found))} runs inside it")
    fixed = {key: value for key, value in options.items() if key not in PER_CALL | _NOT_READ}
    for key, value in fixed.items():
        if any(not isinstance(leaf, bool | int | float | str | None) for leaf in pytree.tree_leaves(value)):
            raise CaptureError(f"a patch of {key!r} runs inside it")
    return fixed


def _compare(seen: Any, expected: Any) -> None:
    """A graph that depends on what changes from call to call must not be used: its first call is made both ways."""
    for one, other in zip(pytree.tree_leaves(seen), pytree.tree_leaves(expected), strict=True):
        scale = max(float(other.abs().max()), 1e-12)
        if not float((one - other).abs().max()) / scale <= TOLERANCE.get(other.dtype, 5e-2):
            raise CaptureError("its graph answers otherwise than the diffusion model with all its options")


def _is_low_vram(base: nn.Module) -> bool:
    return bool(getattr(base, "model_lowvram", False))


def _row_keys(options: Mapping[str, Any], rows: int) -> list[Hashable] | None:
    """One name for each row: its conditioning, its context window and its place; None if ComfyUI does not say."""
    uuids = options.get("uuids")
    if not uuids or rows % len(uuids):
        return None
    window = options.get("context_window")
    frames = None if window is None else tuple(getattr(window, "index_list", (id(window),)))
    return [(uuid, frames, row) for uuid in uuids for row in range(rows // len(uuids))]
