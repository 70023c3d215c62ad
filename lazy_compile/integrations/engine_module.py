"""Exported models in diffusers pipelines: one takes the place of the transformer, and the pipeline runs unchanged.

>>> pipe.transformer = EngineModule("m.onnx", like=pipe.transformer)  # doctest: +SKIP

:func:`~lazy_compile.integrations.pipeline_engines.export_pipeline` writes the file too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lazy_compile.backends.denoiser import EngineDenoiser, check_same_model
from lazy_compile.backends.open_runner import open_runner
from lazy_compile.backends.runner import Runner
from lazy_compile.config import LazyConfig
from lazy_compile.errors import BackendError
from lazy_compile.policies.policy import Policy
from lazy_compile.policies.presets import PolicyLike
from lazy_compile.runtime.host_hints import use_stream
from lazy_compile.runtime.module import LazyModule
from lazy_compile.runtime.stats import LazyStats


class EngineModule(nn.Module):
    """An exported model that a diffusers pipeline takes for the original.

    It has the original's signature, configuration and, where one asks for it, class; ``type()`` tells the truth. None
    of the original's weights are kept. ``cache_context`` keeps apart what a guidance calls once for each condition.

    Args:
        source: an ONNX file, an engine, a folder of either, or a runner of one.
        like: the original, or the lazy model that was exported.
        policy: see :class:`~lazy_compile.backends.denoiser.EngineDenoiser`.
        config: as there.
        verify: False reads the files without holding them against their digests.

    Raises:
        ArtifactError: it was exported from another model, or is damaged.
    """

    def __init__(
        self,
        source: str | Path | Runner,
        *,
        like: nn.Module,
        policy: PolicyLike | None = None,
        config: LazyConfig | None = None,
        verify: bool = True,
    ) -> None:
        original = like.original if isinstance(like, LazyModule) else like
        self.__dict__["_imitated"] = type(original)
        super().__init__()
        runner = source if isinstance(source, Runner) else open_runner(source, verify=verify)
        check_same_model(runner.metadata, original, "this" if isinstance(source, Runner) else source)
        self.denoiser = EngineDenoiser(runner, policy, config)
        self.config = getattr(original, "config", None)
        self.__dict__["__module__"] = type(original).__module__  # diffusers reads the library's name there
        self.__dict__["forward"] = _with_signature(self.denoiser, inspect.signature(original.forward))
        self.eval()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.__dict__["_imitated"]  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that go in."""
        inputs = (getattr(torch, item.dtype) for item in self.denoiser.runner.metadata.inputs)
        return next((dtype for dtype in inputs if dtype.is_floating_point), torch.float32)

    @property
    def device(self) -> torch.device:
        return self.denoiser.runner.device

    @property
    def policy(self) -> Policy:
        return self.denoiser.policy

    @policy.setter
    def policy(self, policy: PolicyLike) -> None:
        self.denoiser.policy = policy

    @property
    def stats(self) -> LazyStats:
        """What was reused; see :attr:`~lazy_compile.backends.denoiser.EngineDenoiser.stats`."""
        return self.denoiser.stats

    def reset_stats(self) -> None:
        """Count from here on."""
        self.denoiser.reset_stats()

    def reset(self) -> None:
        """Forget all caches: the next call starts a trajectory."""
        self.denoiser.reset()

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Calls in here belong to the stream ``name``, as diffusers' own caches have it."""
        with use_stream(name):
            yield

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        self.reset()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """
        Raises:
            BackendError: always; an engine holds no weights that diffusers could write.
        """
        raise BackendError("an exported model has no weights to save; copy its file, or save the original pipeline")


def _with_signature(denoiser: EngineDenoiser, signature: inspect.Signature) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return denoiser(*args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def call_by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by the names of the original's parameters."""
    original = model.original if isinstance(model, LazyModule) else model
    return {**dict(zip(inspect.signature(original.forward).parameters, args, strict=False)), **kwargs}


@contextmanager
def observed_call(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The arguments of the last call of ``model`` in this context, by name: an example for ``export_onnx``.

    An export follows one call, and a pipeline knows best how it calls.
    """
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen.update(call_by_name(model, args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
