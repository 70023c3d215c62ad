"""Engines whose resolution, frames and text length are free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from lazy_compile import export_onnx
from lazy_compile.backends.onnx.metadata import OnnxMetadata
from lazy_compile.backends.onnx.sizes import ShapeRange, shape_at
from lazy_compile.backends.tensorrt.build import build_engine
from lazy_compile.backends.tensorrt.config import BuildConfig
from lazy_compile.backends.tensorrt.shared_sizes import with_shared_sizes
from lazy_compile.backends.tensorrt.source import OnnxSource
from support.slow import slow_but
from zoo.subject import subject

Exported = tuple[str, Path, OnnxMetadata]

SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "SD3Transformer2DModel": tuple(
        {"batch": batch, "height": height, "width": width, "encoder_hidden_states_1": words}
        for batch, height, width, words in ((1, 4, 6, 3), (2, 8, 8, 5), (4, 16, 8, 9))
    ),
    "FluxTransformer2DModel": tuple(
        {"batch": batch, "tokens": tokens, "img_ids_0": tokens, "encoder_hidden_states_1": words, "txt_ids_0": words}
        for batch, tokens, words in ((1, 8, 3), (2, 16, 5), (4, 64, 9))
    ),
    "WanTransformer3DModel": tuple(
        {"batch": batch, "frames": frames, "height": height, "width": width, "encoder_hidden_states_1": words}
        for batch, frames, height, width, words in ((1, 1, 4, 4, 3), (2, 2, 8, 8, 5), (4, 3, 16, 8, 9))
    ),
}
"""Joint attention taken apart by slices; by a split, with rotary tables of sizes of their own; and none."""


@pytest.fixture(scope="module", params=slow_but(["SD3Transformer2DModel"], list(SIZES)))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("free") / "model.onnx"
    export_onnx(subject(request.param).fresh(), path, subject(request.param).arguments)
    return request.param, path, OnnxSource.read(path).require_lazy()


def test_it_computes_what_the_file_does(exported: Exported) -> None:
    name, path, metadata = exported
    shared = path.with_name("shared.onnx")
    shared.write_bytes(with_shared_sizes(path, metadata))
    original, changed = (onnxruntime.InferenceSession(str(each)) for each in (path, shared))
    draw = np.random.default_rng(0)
    for sizes in SIZES[name]:
        for seed in range(2):
            given = {each.name: _drawn(each, sizes, draw) for each in original.get_inputs()}
            for one, other in zip(original.run(None, given), changed.run(None, given), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5, err_msg=f"{sizes} {seed}")


def test_an_engine_is_built_with_every_size_free(exported: Exported, tmp_path: Path) -> None:
    name, path, metadata = exported
    shapes = [{spec.name: shape_at(spec.shape, sizes) for spec in metadata.inputs} for sizes in SIZES[name]]
    profiles = (ShapeRange(*shapes), ShapeRange(shapes[1], shapes[1], shapes[2]))
    report = build_engine(path, tmp_path / "model.engine", BuildConfig("rtx", profiles))
    assert len(report.structure.branches) == len(metadata.branches)


def _drawn(value: Any, sizes: dict[str, int], draw: np.random.Generator) -> Any:
    shape = shape_at(value.shape, sizes)
    if "int64" in value.type:
        return draw.integers(0, 3, shape)
    return draw.normal(size=shape).astype(np.float32)
