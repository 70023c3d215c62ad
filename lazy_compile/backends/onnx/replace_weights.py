"""Other weights in an exported file, by the names of the original's state dict: a fused LoRA without a new export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lazy_compile.backends.onnx.metadata import KEY, OnnxMetadata
from lazy_compile.backends.onnx.prologue import PROLOGUE_KEY, check_prologue, digest_of_prologue, find_prologue
from lazy_compile.backends.onnx.save import save_pair
from lazy_compile.backends.onnx.sealed_file import check_file
from lazy_compile.backends.onnx.weight_places import WEIGHTS_KEY, Place, digest_of_weight
from lazy_compile.errors import ArtifactError, ConfigError, import_optional
from lazy_compile.ir.program import module_state
from lazy_compile.storage import parse_json

if TYPE_CHECKING:
    from onnx_ir import Model, Value


def replace_weights(
    onnx: str | Path, weights: nn.Module | Mapping[str, Tensor], output: str | Path | None = None
) -> tuple[str, ...]:
    """Write other weights of the same model into an exported file, in place of a new export; the prologue's too.

    Args:
        onnx: what ``export_onnx`` wrote, with ``gating="input"`` or ``"predicate"``.
        weights: the original, or its state dict by the names that it had when it was exported. A LoRA must be fused:
            ``pipe.fuse_lora()`` of diffusers, ``model.merge_adapter()`` of peft; names with ``base_layer`` are known.
        output: where to write; None replaces the file.

    Returns:
        Names of the weights that are others now.

    Raises:
        ArtifactError: the file cannot be read or written, or does not say where its weights lie.
        ConfigError: a weight is missing, of another shape, not fused, or was folded into a constant of the file.
    """
    path = Path(onnx)
    state = _state_of(weights)
    check_file(path)
    model = _loaded(path)
    metadata = OnnxMetadata.parse(model.metadata_props)
    changed = _write(model, state, path)
    beside = find_prologue(path, metadata)
    prologue = None
    if beside is not None:
        check_file(beside)
        prologue = _loaded(beside)
        check_prologue(beside, prologue.metadata_props.get(PROLOGUE_KEY, ""), path, metadata)
        changed |= _write(prologue, state, beside)
        prologue.metadata_props[PROLOGUE_KEY] = digest_of_prologue(prologue)
        metadata = replace(metadata, prologue=prologue.metadata_props[PROLOGUE_KEY])
        model.metadata_props[KEY] = metadata.to_json()
    save_pair(model, prologue, path if output is None else Path(output), metadata.gating)
    return tuple(sorted(changed))


def _loaded(path: Path) -> Model:
    """A model with all its weights in memory: those in a file beside it are written anew."""
    ir = import_optional("onnx_ir", "onnx")
    return ir.external_data.load_to_model(ir.load(path))  # type: ignore[no-any-return]


def _write(model: Model, state: Mapping[str, Tensor], path: Path) -> set[str]:
    """Put weights into the initializers that hold them; the names of those that differ."""
    entry = _entry_of(model, path)
    for name, digest in entry["contents"].items():
        if name in state and digest_of_weight(state[name]) != digest:
            raise ConfigError(
                f"{name} is others now, and {path.name} does not hold it as it is: it was folded into a constant; "
                "export the model again"
            )
    changed: set[str] = set()
    written: dict[str, tuple[str, Tensor]] = {}
    for name, places in entry["places"].items():
        if name not in state:
            raise ConfigError(f"there is no weight {name}, which {path.name} holds; give the state dict of its model")
        for initializer, transposed in places:
            place = Place(model.graph.initializers[initializer], transposed)
            weight = place.arranged(state[name])
            if tuple(weight.shape) != place.shape:
                raise ConfigError(
                    f"{name} has the shape {tuple(state[name].shape)}, {path.name} holds it as "
                    f"{place.shape}; give the weights of the model that was exported"
                )
            other, before = written.setdefault(initializer, (name, weight))
            if not torch.equal(before, weight):
                raise ConfigError(
                    f"{name} and {other} were equal and share one place in {path.name}, and differ now; export again"
                )
            if other == name and not place.holds(state[name]):
                place.value.const_value = _tensor(weight, place.value)
                changed.add(name)
    return changed


def _entry_of(model: Model, path: Path) -> dict[str, Any]:
    try:
        text = model.metadata_props[WEIGHTS_KEY]
        entry: dict[str, Any] = parse_json(text, f"the list of weights inside {path.name}")
        known = {place for places in entry["places"].values() for place, _ in places}
        if missing := known - set(model.graph.initializers):
            raise KeyError(min(missing))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} does not say where its weights lie: files of a set, simplified ones and those of earlier releases "
            "do not; export the model again"
        ) from error
    return entry


def _state_of(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that they have without adapters."""
    if isinstance(weights, nn.Module):
        apart = [path for path, module in weights.named_modules() if _is_unmerged(module)]
        state: Mapping[str, Tensor] = module_state(weights)
    else:
        state = weights
        apart = [] if any(".base_layer." in name for name in state) else [n for n in state if _of_adapter(n)]
    if apart:
        raise ConfigError(
            f"{apart[0]} has an adapter that is not fused into its weight; call pipe.fuse_lora() or "
            "model.merge_adapter() before"
        )
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if not _of_adapter(name)}


def _is_unmerged(module: nn.Module) -> bool:
    """Whether a layer of peft adds something to its weight as it runs."""
    return hasattr(module, "base_layer") and bool(getattr(module, "active_adapters", ())) and not (
        getattr(module, "merged", True) or getattr(module, "disable_adapters", False)
    )  # fmt: skip


def _of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _tensor(weight: Tensor, value: Value) -> Any:
    adapters = import_optional("onnx_ir.tensor_adapters", "onnx")
    return adapters.TorchTensor(weight, name=value.name)
