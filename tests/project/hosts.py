"""The table of hosts in ``docs/integrations.md``, made of what ran: ``python -m project.hosts [HOST ...]``.

The tests of each host are run; how many passed, and with which releases, goes to ``docs/results/hosts.json``, and the
table is written from there. A host whose package is not installed keeps its last record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from lazy_compile.storage import save_json

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "results" / "hosts.json"
PAGE = ROOT / "docs" / "integrations.md"
START, END = "<!-- hosts -->\n", "<!-- end of hosts -->\n"


@dataclass(frozen=True)
class Host:
    """One row.

    Attributes:
        line: what a user writes.
        order: what comes first, and what does not go together.
        tests: files, or single tests, below ``tests``.
        packages: those whose releases are named; all must be installed for the tests to run.
        not_run: what no test has run.
    """

    name: str
    line: str
    order: str
    tests: tuple[str, ...]
    packages: tuple[str, ...] = ("torch",)
    not_run: str = ""


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/test_{name}.py" for name in names)


def _example(name: str) -> str:
    return f"examples/test_gallery.py::test_an_example_is_exact_and_then_lazy[{name}.py]"


def _four(*names: str) -> tuple[str, ...]:
    test = "test_it_is_exact_and_lazy_keeps_requests_apart_and_is_given_back"
    return tuple(f"integrations/test_four_questions.py::{test}[{name}]" for name in names)


HOSTS = (
    Host(
        "[diffusers](integrations/diffusers.md), pipeline",
        '`lazy_compile.transform(pipe, policy="balanced")`',
        "LoRA and offload in either order; [what does not go](#weights-stored-otherwise)",
        (*_in("integrations", "diffusers_pipeline", "diffusers_hosts"), *_four("of_a_pipeline")),
        ("diffusers", "peft", "accelerate"),
        "a GPU",
    ),
    Host(
        "[diffusers](integrations/diffusers.md#enable_cache), model",
        "`pipe.transformer.enable_cache(LazyCacheConfig())`",
        "one cache at a time; modular pipelines too",
        (*_in("integrations", "diffusers_cache", "diffusers_enable_cache"), *_four("by_enable_cache")),
        ("diffusers",),
        "a GPU",
    ),
    Host(
        "[the Hub](integrations/diffusers.md#on-the-command-line)",
        "`lazy-compile inspect owner/name#transformer`",
        "",
        _in("integrations", "diffusers_hub"),
        ("diffusers", "huggingface_hub"),
        "a download",
    ),
    Host(
        "[ComfyUI](integrations/comfyui.md)",
        "*Lazy Compile (preset)* between loader and sampler",
        "LoRA nodes in either order; patches inside the model run dense, and it says so",
        _in("integrations", "comfyui"),
        not_run="ComfyUI itself: a stand-in of its interfaces",
    ),
    Host(
        "[vLLM-Omni, SGLang, TensorRT-LLM](integrations/serving.md)",
        '`LazyCacheBackend(policy="balanced")`',
        "after the engine has loaded its weights",
        ("integrations/test_serving.py",),
        not_run="the engines: their calls, as in their sources",
    ),
    Host(
        "[a server of your own](integrations/serving.md#continuous-batching)",
        "`with lazy.trajectory(names, step=steps):`",
        "rows come and go at any step",
        ("integrations/test_serving.py::test_rows_that_come_and_go_are_what_they_are_alone",),
    ),
    Host(
        "an engine in a pipeline",
        "`EngineModule`, see [TensorRT](tensorrt.md#running)",
        "an engine: the sizes it was built for",
        (*_in("integrations", "engine_module"), *_four("in_onnx_runtime"), _example("engine")),
        ("diffusers", "onnxruntime"),
        "TensorRT engines, which take a GPU",
    ),
    Host(
        "[OpenVINO](integrations/openvino.md)",
        '`OpenVinoRunner("m.onnx")`',
        "fp32 and fp16, single files",
        (*_in("backends", "openvino"), *_four("in_openvino")),
        ("openvino",),
        "GPUs and NPUs; Optimum-Intel; [NNCF leaves arms out](integrations/openvino.md)",
    ),
    Host(
        "NVIDIA ModelOpt",
        '`mto.apply_mode(model, "lazy_compile")`',
        "quantise before or after; no block-wise or dynamic quantisers",
        (*_in("integrations", "modelopt"), *_four("quantised_by_modelopt")),
        ("nvidia-modelopt",),
        "a GPU",
    ),
    Host(
        "[`torch.compile`](integrations/torch_compile.md)",
        '`torch.compile(model, backend="lazy_compile")`, `lazy.compile()`, `torch.compile(lazy)`',
        "",
        (
            *_in("integrations", "dynamo"),
            *_in("runtime", "interop_compile"),
            *_four("by_torch_compile", "compiled_in_parts"),
        ),
        not_run="a GPU",
    ),
    Host(
        "peft",
        "LoRA before or after `transform(model)`",
        "each change is a new capture",
        (*_in("runtime", "interop_adapters"), *_four("with_lora"), _example("lora")),
        ("peft",),
    ),
    Host(
        "accelerate, torchrun",
        "`accelerate launch ... -m lazy_compile calibrate`",
        "each process holds the whole model",
        (*_in("integrations", "accelerate"), *_four("offloaded_by_accelerate")),
        ("accelerate",),
        "several GPUs: two gloo processes",
    ),
    Host(
        "ONNX Runtime for phones",
        "`lazy-compile export MODEL --target ort-mobile`",
        "not with `--gating schedule`",
        _in("backends/onnxruntime", "mobile"),
        ("onnxruntime",),
        "a phone",
    ),
    Host(
        "Polygraphy",
        "`polygraphy run m.onnx --lazy --lazy-every 2`",
        "compare runtimes through `--save-outputs`",
        _in("integrations", "polygraphy"),
        ("polygraphy",),
    ),
    Host(
        "optimum-cli",
        "`optimum-cli lazy-compile VERB ...`",
        "installed from `examples/optimum_cli`",
        _in("integrations", "optimum"),
        ("optimum",),
    ),
    Host(
        "[Pruna](#pruna)",
        '`SmashConfig({"lazy_compile": {"interval": 2}})`',
        "a schedule after smashing",
        _in("integrations", "pruna"),
        ("pruna",),
        "a GPU",
    ),
    Host(
        "[Olive](#olive)",
        "`LazyCompile`, Olive's quantisation, `LazyCompileSeal`",
        'dynamic, with `extra_options={"EnableSubgraph": True}`',
        _in("integrations", "olive"),
        ("olive-ai",),
        "static quantisation",
    ),
    Host(
        "[several processes](integrations/parallelism.md)",
        "`parallelize_module`, `enable_parallelism`",
        "before or after `transform`; no FSDP",
        _in("integrations", "parallelism"),
        ("torch", "diffusers"),
        "GPUs: two gloo processes; ring attention",
    ),
    Host(
        "torchao",
        "`quantize_(model, ...)`, before or after `transform(model)`",
        "not `quantize_(lazy, ...)`",
        (*_in("integrations", "torchao"), *_four("quantised_by_torchao")),
        ("torchao",),
        "a GPU",
    ),
)


class Outcomes:
    """A plug-in of pytest that counts."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed


def record(host: Host) -> dict[str, Any] | None:
    """Run a host's tests; None where one of its packages is not installed."""
    try:
        releases = {name: version(name) for name in host.packages}
    except PackageNotFoundError:
        return None
    outcomes = Outcomes()
    pytest.main(["-q", "-m", "", *[str(ROOT / "tests" / test) for test in host.tests]], plugins=[outcomes])
    return {"passed": outcomes.passed, "failed": outcomes.failed, "releases": releases}


def table(records: Mapping[str, Any]) -> str:
    """Markdown, one row a host."""
    lines = ["| host | one line | order, limits | run with | tests | not run |", "|---|---|---|---|---|---|"]
    for host in HOSTS:
        seen = records.get(host.name)
        if seen is None:
            ran, tests = "", "not recorded"
        else:
            ran = ", ".join(f"{name} {release}" for name, release in seen["releases"].items())
            tests = f"{seen['passed']} pass" + (f", **{seen['failed']} fail**" if seen["failed"] else "")
        lines.append(f"| {host.name} | {host.line} | {host.order} | {ran} | {tests} | {host.not_run} |")
    return "\n".join(lines) + "\n"


def read_records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def written_table() -> str:
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


def main(chosen: list[str]) -> None:
    records = read_records()
    for host in HOSTS:
        if not chosen or any(name.lower() in host.name.lower() for name in chosen):
            found = record(host)
            records = records if found is None else {**records, host.name: found}
            save_json(RECORDS, records)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + table(records) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
