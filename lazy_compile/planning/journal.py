"""What a search has measured so far, one file a measurement, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lazy_compile.errors import ArtifactError
from lazy_compile.planning.sample_response import Response
from lazy_compile.policies.schedule import CacheSchedule
from lazy_compile.processes import Processes, averaged
from lazy_compile.runtime.artifact import fingerprint
from lazy_compile.runtime.module import LazyModule
from lazy_compile.storage import load_json, load_tensors, save_json, save_tensors

Arrays = Mapping[str, npt.NDArray[Any]]

IDENTITY = "search.json"


class Journal:
    """A folder of measurements that belong to one search; without a folder nothing is remembered.

    Several processes read it at the beginning and never again, so that they agree on what is left to do; the first
    one writes. A search decides by its measurements alone: with those that are there, it takes the same way again.

    Raises:
        ArtifactError: the folder belongs to another search, or cannot be read or written.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], groups: Sequence[str] = ()) -> None:
        """``groups`` of processes that run one model together decide by one figure, the mean of what each measures."""
        self.folder, self.groups = folder, groups
        self.known: frozenset[str] = frozenset()
        if folder is None:
            return
        processes = Processes.here()
        if os.path.lexists(folder / IDENTITY):  # a link to nowhere is no fresh start
            seen = load_json(folder / IDENTITY)
            if seen != identity:
                different = sorted(
                    key for key in identity if not isinstance(seen, dict) or seen.get(key) != identity[key]
                )
                raise ArtifactError(
                    f"the checkpoint {folder} belongs to another search: {', '.join(different)} differ; "
                    "use the same model and options, or another folder to start afresh"
                )
            self.known = frozenset(file.stem for file in folder.glob("*.safetensors"))
        processes.wait()  # the first one may write soon
        if processes.is_first and not (folder / IDENTITY).exists():
            save_json(folder / IDENTITY, dict(identity))
        processes.wait()

    def recall(self, name: str, *keys: str) -> Arrays | None:
        """A measurement of an earlier run, with these arrays at least.

        Raises:
            ArtifactError: it is damaged, or lacks one of them.
        """
        if self.folder is None or name not in self.known:
            return None
        path = self.folder / f"{name}.safetensors"
        tensors, _ = load_tensors(path)
        for key in keys:
            if key not in tensors:
                raise ArtifactError(f"{path} lacks {key!r}; delete it, and it is measured again")
        return {key: tensor.numpy() for key, tensor in tensors.items()}

    def write(self, name: str, arrays: Arrays) -> None:
        if self.folder is not None and Processes.here().is_first:
            tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}
            save_tensors(self.folder / f"{name}.safetensors", tensors)

    def array(self, name: str, measure: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """One array, measured unless it is known."""
        known = self.recall(name, "values")
        if known is not None:
            return known["values"]
        values = averaged(torch.from_numpy(measure()), self.groups).numpy()
        self.write(name, {"values": values})
        return values

    def response(self, schedule: CacheSchedule, seed: int, order: int, measure: Callable[[], Response]) -> Response:
        """A response around a schedule, for reuse of an order, measured unless it is known."""
        name = f"response-{seed}-{digest(schedule)}"
        known = self.recall(name, "size", *RESPONSE[:2])
        if known is not None:
            arrays = {key: known[key] for key in RESPONSE if key in known}
            return Response(schedule, size=known["size"].item(), order=order, **arrays)
        response = measure()
        arrays = {key: getattr(response, key) for key in RESPONSE if getattr(response, key) is not None}
        self.write(name, {"size": np.array([response.size]), **arrays})
        return response


RESPONSE = ("directional_derivatives", "error", "weight", "timesteps", "sensitivity")
"""Arrays of a response beside its schedule."""


def digest(schedule: CacheSchedule) -> str:
    content = hashlib.sha256(schedule.should_compute.tobytes())
    if schedule.slopes is not None:
        content.update(schedule.slopes.tobytes())
    return content.hexdigest()[:16]


def identity_of(denoiser: Any, **options: Any) -> dict[str, Any]:
    """What a search depends on: the model with its weights, its branches, and the options; of an engine, what its file
    says of itself."""
    if isinstance(denoiser, LazyModule):
        sums = [f"{float(weight.detach().double().abs().sum()):.6e}" for weight in denoiser.original.parameters()]
        model, config = fingerprint(denoiser.original), denoiser.lazy_config
    else:
        model, sums, config = repr(denoiser.runner.metadata.fingerprint), [], denoiser.config
    return {
        "kind": "lazy_compile schedule search",
        "model": model,
        "weights": hashlib.sha256(" ".join(sums).encode()).hexdigest(),
        "branches": [branch.name for branch in denoiser.branches],
        "lazy_config": repr(sorted(asdict(config).items())),
        **{name: repr(value) for name, value in options.items()},
    }
