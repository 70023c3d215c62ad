"""Every verb, as a user types it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from lazy_compile import errors
from lazy_compile.cli.app import exit_codes
from lazy_compile.planning.search import SearchOptions
from support.command_line import answer, call, refusal
from support.factories import tiny_inputs, tiny_model
from support.slow import slow_but

EULER = ["--sampler", "support.factories:euler", "--steps", "4"]


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "gates"
    values = answer(
        "calibrate",
        "support.factories:tiny_dit",
        *EULER,
        "--target-lazy-ratio",
        0.4,
        "--iterations",
        1,
        "--output",
        folder,
    )
    assert values["output"] == str(folder)
    assert abs(values["lazy_ratio"] - 0.4) < 0.1
    assert values["kept"] in ("planned", "trained")
    return folder


@pytest.fixture(scope="module")
def onnx(gates: Path) -> Path:
    path = gates.parent / "model.onnx"
    values = answer("export", "support.factories:tiny_dit", "--gates", gates, "--dynamic", "none", "--output", path)
    assert (values["branches"], values["if_nodes"], values["heavy_ops_outside_if"]) == (4, 4, [])
    assert path.exists()
    return path


# inspect


def test_inspect_lists_the_branches_and_their_cost() -> None:
    result = call("inspect", "support.factories:tiny_dit", "--why-not")
    assert result.exit_code == 0, result.output
    for text in ("blocks.1#2", "self_attention", "mlp", "2x16x16", "4 branches hold", "time input: timestep"):
        assert text in result.stdout


def test_inspect_json_adds_up() -> None:
    values = answer("inspect", "support.factories:tiny_dit", "--set", "reuse=last")
    assert [branch["index"] for branch in values["branches"]] == [0, 1, 2, 3]
    assert sum(branch["share"] for branch in values["branches"]) == pytest.approx(values["share_in_branches"])
    assert sum(branch["cache_bytes"] for branch in values["branches"]) == values["cache_bytes"] == 4 * 2 * 16 * 16 * 4
    assert values["capture"] == "export, dynamic sizes"
    assert values["attempts"] == values["guarded_inputs"] == []


def test_inspect_says_how_the_model_was_captured_and_on_what_the_graph_depends() -> None:
    result = call("inspect", "support.factories:reads_its_mask")
    assert result.exit_code == 0, result.output
    assert "captured by export, dynamic sizes, guarded values; time input: timestep" in result.stdout
    assert "captured again when the model reads other values from mask" in result.stdout
    assert "tried before: export, dynamic sizes: GuardOnDataDependentSymNode: " in result.stdout
    assert "tried before: strict export, dynamic sizes: " in result.stdout


def test_captures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "inspect", "support.factories:tiny_dit", "--capture-cache", str(tmp_path)
    first = answer(*arguments)
    monkeypatch.setattr("torch.export.export", lambda *args, **kwargs: pytest.fail("a capture was made"))
    assert answer(*arguments) == first


def test_inspect_takes_shapes_for_a_model_without_example_inputs() -> None:
    shapes = ["--shape", "hidden_states:3x1x4x4", "--shape", "timestep:3:int64"]
    assert answer("inspect", "support.factories:bare_dit", *shapes)["branches"][0]["entries"] == [[3, 16, 16]]


@pytest.mark.parametrize(
    ("after", "present", "absent"),
    [
        ("insert_gates", "lazy_step", "scaled_dot_product_attention"),
        *slow_but(
            [],
            [
                ("canonicalize", "scaled_dot_product_attention", "lazy_step"),
                ("lower_to_select", "lazy_compile.select", "lazy_step"),
            ],
        ),
    ],
)
def test_inspect_prints_the_graph_after_a_pass(after: str, present: str, absent: str) -> None:
    graph = call("inspect", "support.factories:tiny_dit", "--after", after).stdout
    assert "[target=torch.ops.aten." in graph
    assert present in graph
    assert absent not in graph


def test_inspect_reads_an_exported_program(tmp_path: Path) -> None:
    inputs = tiny_inputs()
    torch.export.save(torch.export.export(tiny_model(), (), inputs), tmp_path / "tiny.pt2")
    values = answer("inspect", tmp_path / "tiny.pt2")
    assert len(values["branches"]) == 4
    assert values["timestep_input"] == "timestep"


# calibrate, plan, export, run, verify, report


def test_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ["calibrate", "support.factories:tiny_dit", *EULER, "--target-lazy-ratio", 0.4, "--iterations", 2]
    values = answer(*arguments, "--output", tmp_path / "gates", "--dry-run")
    assert (values["branches"], values["steps"]) == (4, 4)
    assert values["searching a schedule (at most)"] == SearchOptions().trajectories * 4
    assert values["training gates"] == 2 * 2 * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gates_for_several_numbers_of_steps_do_at_each_what_those_for_it_alone_do(tmp_path: Path) -> None:
    arguments = ["calibrate", "support.factories:tiny_dit", *EULER[:2], "--target-lazy-ratio", 0.4, "--iterations", 1]
    both = answer(*arguments, "--steps", 2, "--steps", 4, "--output", tmp_path / "both")["calibrations"]
    assert [each["steps"] for each in both] == [2, 4]
    for steps, report in zip((2, 4), both, strict=True):
        alone = answer(*arguments, "--steps", steps, "--output", tmp_path / f"{steps}")
        assert {**alone, "seconds": 0, "output": ""} == {**report, "seconds": 0, "output": ""}
        run = ["run", "support.factories:tiny_dit", *EULER[:2], "--steps", steps, "--output", tmp_path / "samples.npy"]
        samples, reuse = [], []
        for folder in ("both", f"{steps}"):
            reuse.append(answer(*run, "--gates", tmp_path / folder)["reuse"])
            samples.append(np.load(tmp_path / "samples.npy"))
        assert reuse[0] == reuse[1]
        assert np.any(reuse[0])
        assert np.array_equal(samples[0], samples[1])


def test_plan_writes_a_schedule_that_meets_its_budget(tmp_path: Path) -> None:
    values = answer("plan", "support.factories:tiny_dit", *EULER, "--compute-ratio", 0.7, "--output", tmp_path)
    assert values["compute_ratio"] <= 0.7
    table = np.array(values["should_compute"])
    assert table.shape == (4, 4)
    assert values["lazy_ratio"] == pytest.approx(1 - table.mean())
    assert json.loads((tmp_path / "lazy.json").read_text())["policy"]["should_compute"] == table.tolist()


def test_plan_takes_a_schedule_from_a_file_or_from_gates(gates: Path, tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    file.write_text(json.dumps({"steps_mask": [1, 0, 1, 0]}))
    values = answer("plan", "support.factories:tiny_dit", *EULER, "--import", file, "--output", tmp_path / "masked")
    assert values["should_compute"] == [[1] * 4, [0] * 4] * 2
    values = answer("plan", "support.factories:tiny_dit", *EULER, "--freeze", gates, "--output", tmp_path / "frozen")
    assert np.array(values["should_compute"]).shape == (4, 4)
    assert values["lazy_ratio"] > 0


def test_run_follows_the_gates_and_saves_samples(gates: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.npy"
    values = answer("run", "support.factories:tiny_dit", *EULER, "--gates", gates, "--output", path)
    assert (values["runtime"], values["policy"], values["steps"]) == ("PyTorch", "Learned", 4)
    assert values["lazy_ratio"] == pytest.approx(np.mean(values["reuse"]))
    assert values["lazy_ratio"] > 0
    assert np.load(path).shape == (2, 1, 4, 4)


def test_onnx_runtime_draws_the_same_samples(gates: Path, onnx: Path, tmp_path: Path) -> None:
    arguments = ["run", "support.factories:tiny_dit", *EULER, "--gates", gates]
    here, there = tmp_path / "pytorch.npy", tmp_path / "onnxruntime.npy"
    assert answer(*arguments, "--output", here)["runtime"] == "PyTorch"
    assert answer(*arguments, "--onnx", onnx, "--output", there)["runtime"] == "ONNX Runtime"
    assert np.abs(np.load(here) - np.load(there)).max() < 1e-4


def test_verify_passes_a_sound_model_and_its_export(gates: Path, onnx: Path) -> None:
    values = answer("verify", "support.factories:tiny_dit", *EULER, "--gates", gates, "--onnx", onnx)
    assert values["passed"]
    assert {"always compute", "schedule: outputs", "ONNX: structure", "ONNX Runtime: Learned"} <= {
        check["name"] for check in values["checks"]
    }


def test_verify_fails_with_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazy_compile.runtime.cache.extrapolate", lambda value, earlier, weights, axis: value)
    result = call("verify", "support.factories:tiny_dit", "--sampler", "support.factories:euler", "--steps", 8)
    assert result.exit_code == errors.VerificationError.exit_code
    assert "FAILED" in result.stdout
    assert "\nerror: 1 of 3 checks failed; schedule: outputs: seen relative difference" in result.stderr


def test_report_shows_gates(gates: Path, tmp_path: Path) -> None:
    assert answer("report", gates, "--output", tmp_path / "gates.html")["output"] == str(tmp_path / "gates.html")
    assert "What the gates lean to" in (tmp_path / "gates.html").read_text()


def test_default_sampler_is_a_diffusers_scheduler() -> None:
    values = answer("run", "support.factories:tiny_dit", "--steps", 3, "--scheduler", "flow-match")
    assert (values["steps"], values["lazy_ratio"]) == (3, 0.0)


def test_bench_and_demo_hand_over_to_their_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazy_compile.bench.speed import SpeedRow

    summary = {"model": "m", "steps": 1, "rows": [], "decisions_varying_between_samples": 0.0, "onnx": {}}
    monkeypatch.setattr("lazy_compile.demo.run.run_demo", lambda output, progress: summary)
    monkeypatch.setattr(
        "lazy_compile.bench.speed.run",
        lambda output, on_progress: [SpeedRow("eager", "last", 0.5, 0.6, (0.5, 0.7), 0.55, 0.92)],
    )
    assert answer("demo", "--output", tmp_path) == summary
    (row,) = answer("bench", "speed", "--output", tmp_path)["rows"]
    assert (row["runtime"], row["efficiency"]) == ("eager", 0.92)
    assert "0.920" in call("bench", "speed", "--output", tmp_path).stdout


# Errors


@pytest.mark.parametrize(
    ("code", "arguments", "complaint"),
    [
        (2, ["inspect", "nowhere.at_all:f"], "there is no module 'nowhere'"),
        (2, ["inspect", "support.factories:nothing"], "factories has no 'nothing'"),
        (2, ["inspect", "support.factories:WIDTH"], "factories:WIDTH is int, not a function"),
        (2, ["inspect", "support.factories:not_a_model"], "returned str; expected a torch.nn.Module"),
        (2, ["inspect", "factories"], "'factories' is neither a folder nor a .pt2 file nor package.module:factory"),
        (2, ["inspect", "support.factories:bare_dit"], "its forward takes (hidden_states, timestep): give --shape"),
        (
            2,
            ["inspect", "support.factories:bare_dit", "--shape", "x:2"],
            "no argument 'x'; it takes (hidden_states, timestep)",
        ),
        (2, ["inspect", "support.factories:bare_dit", "--shape", "timestep:two"], "is not NAME:2x4x32x32"),
        (2, ["inspect", "support.factories:bare_dit", "--shape", "timestep:2:int3"], "is not NAME:2x4x32x32"),
        (2, ["inspect", "support.factories:tiny_dit", "--set", "speed=3"], "the names are reuse, order, warmup_steps,"),
        (2, ["inspect", "support.factories:tiny_dit", "--set", "warmup_steps=two"], "expected a whole number"),
        (2, ["inspect", "support.factories:tiny_dit", "--set", "reuse=twice"], "reuse is 'twice'; expected one of"),
        (2, ["inspect", "support.factories:tiny_dit", "--device", "abacus"], "device 'abacus' cannot be used"),
        (2, ["plan", "support.factories:tiny_dit", "-o", "x"], "give exactly one"),
        (
            2,
            ["calibrate", "support.factories:tiny_dit", "-o", "x", "--target-lazy-ratio", "1.5"],
            "between 0 and 1; seen 1.5",
        ),
        (2, ["run", "support.factories:tiny_dit", "--gates", "x", "--set", "reuse=last"], "exclude each other"),
        (
            2,
            ["run", "support.factories:tiny_dit", "--onnx", "a", "--engine", "b"],
            "--onnx and --engine exclude each other",
        ),
        (
            5,
            ["run", "support.factories:tiny_dit", "--engine", "no.engine"],
            "no.engine has no no.engine.json beside it",
        ),
        (4, ["inspect", "support.factories:no_branches"], "has no residual branch that could be gated"),
        (5, ["run", "support.factories:tiny_dit", "--gates", "nowhere"], "nowhere holds no lazy.json"),
        (5, ["inspect", "nowhere.pt2"], "there is no file nowhere.pt2"),
        (5, ["report", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_a_refusal_is_one_line_with_its_exit_code(code: int, arguments: list[str], complaint: str) -> None:
    assert complaint in refusal(code, *arguments)


def test_refusals_after_capture(gates: Path, tmp_path: Path) -> None:
    assert "there is no such pass; the passes are canonicalize" in refusal(
        2, "inspect", "support.factories:tiny_dit", "--after", "magic"
    )
    assert "takes no argument 'steps'" in refusal(
        2, "run", "support.factories:tiny_dit", "--sampler", "support.factories:bare_dit", "--steps", 3
    )
    assert "was made for another model" in refusal(5, "run", "support.factories:larger_dit", "--gates", gates)
    assert "there is no file" in refusal(5, "run", "support.factories:tiny_dit", "--onnx", tmp_path / "no.onnx")


def test_damaged_exported_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"not a program")
    assert "write it again with torch.export.save" in refusal(5, "inspect", tmp_path / "bad.pt2")


def test_missing_package_is_named_with_its_extra(gates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = refusal(8, "run", "support.factories:tiny_dit", "--gates", gates)
    assert "'diffusers'" in line
    assert "pip install 'lazy-compile[diffusers]'" in line


def test_interruption_is_one_line() -> None:
    result = call("inspect", "support.factories:interrupted")
    assert (result.exit_code, result.stdout, result.stderr) == (
        130,
        "",
        "importing support.factories:interrupted\ninterrupted\n",
    )


def test_ctrl_c_ends_a_real_process_with_130(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, pathlib\ndef model():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    code = "from lazy_compile.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", "slow:model"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "importing slow:model\ninterrupted\n")


# Help


def verbs() -> list[tuple[str, ...]]:
    names = ["inspect", "calibrate", "plan", "export", "build", "export-triton", "run", "verify", "report", "demo"]
    return [
        *((name,) for name in names),
        ("bench", "speed"),
        ("bench", "overhead"),
        ("bench", "peers"),
        ("bench", "compile"),
        ("bench", "full-size"),
    ]


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_help_teaches_with_an_example(verb: tuple[str, ...]) -> None:
    result = call(*verb, "--help")
    assert result.exit_code == 0
    assert f"Example: lazy-compile {' '.join(verb)}" in click.unstyle(result.stdout)
    assert "--json" in result.stdout


def test_exit_codes_in_help_are_those_of_the_errors() -> None:
    shown = " ".join(call("--help").stdout.split())
    documented = exit_codes()
    for kind in errors.LazyCompileError.__subclasses__():
        assert kind.exit_code in documented
        assert f"{kind.exit_code} - {documented[kind.exit_code]}" in shown
    assert "130 - Interrupted." in shown
