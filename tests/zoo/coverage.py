"""Ask every zoo model every question and write docs/coverage.md: ``make coverage-page``, MODELS="A B" for some rows.

The answers are kept in docs/results/coverage.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from zoo.checks import CHECKS, token_share
from zoo.exceptions import FAILING, OUTSIDE
from zoo.registry import zoo
from zoo.subject import Subject, subject

DOCS = Path(__file__).parents[2] / "docs"
ANSWERS = DOCS / "results" / "coverage.json"
SHOWN = ("attention", "share", "exact", "schedule", "gradients", "batch", "onnx", "sizes")
PYTORCH = ("captures", "branches", "attention", "share", "exact", "schedule", "gradients", "batch")

HEAD = """# Coverage

<!-- Written by `make coverage-page`. -->

Every transformer class that the installed diffusers exports, its U-Nets with transformers, and a few structures that
diffusers lacks: small configurations with random weights, found by dataflow alone, each asked the same questions.

{summary}

- **strategy**: the way that captured it ([strategies](architecture.md#capture)).
- **branches**: how many of each kind; the expected ones stand in `tests/zoo/golden/`.
- **attention**: how many of the model's attentions a branch holds. Softmax attention, fused or written out, and linear
  attention are looked for without the package's own discovery.
- **token MACs**: the share of the multiply-accumulates on tokens that branches hold. At two layers, embedders weigh
  more than they do at full size. In all, a graph has those that `torch.utils.flop_counter` counts.
- **exact**: with nothing reused, equal to the original bit for bit. In the original, the fused kernels that
  `nn.MultiheadAttention` calls in eager mode only are off: a graph holds their parts.
- **reuse**: under a random schedule, the largest difference to an oracle: the captured graph, run with values replaced.
- **gates**: a gradient reaches the gate of every branch that has a say in the result; one model computes an MLP whose
  result it does not return.
- **rows**: branches that decide for each row; the others decide once per call, and `inspect` says why. Under mixed
  decisions, a batch gives what its rows give alone. *Branches alone*: the original itself gives something else for a
  row (OmniGen's images belong to places of the batch), so each branch is run for the batch and for each row instead.
- **ONNX**: one `If` for each branch, and the largest difference between ONNX Runtime and PyTorch, with reuse.
- **free sizes**: those that one exported file takes at whatever length, and at how many other combinations of them it
  was run over a whole trajectory, with reuse, and gave what PyTorch gives.
- **capture**: seconds of one processor, to transform the model.

| model | strategy | branches | attention | token MACs | exact | reuse | gates | rows | ONNX | free sizes | capture |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def ask(model: Subject) -> dict[str, Any]:
    """The answers of one model: ``check -> [passed, what was seen or why not]``."""
    answers: dict[str, Any] = {}
    start = time.process_time()
    for name, check in CHECKS.items():
        try:
            answers[name] = [True, check(model)]
        except Exception as error:
            answers[name] = [False, f"{type(error).__name__}: {error}".splitlines()[0][:200]]
            if name == "captures":
                return answers
        answers.setdefault("capture_seconds", round(time.process_time() - start, 1))
    answers["kinds"] = dict(Counter(branch.kind.value for branch in model.lazy.branches))
    answers["token_share"] = token_share(model)
    return answers


def keep(answers: dict[str, dict[str, Any]]) -> None:
    """One line for each model."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(answers.items()))
    ANSWERS.write_text(f"{{\n{lines}\n}}\n")


def page(answers: dict[str, dict[str, Any]]) -> str:
    rows = [_row(name, found) for name, found in sorted(answers.items())]
    return HEAD.format(summary=_summary(answers)) + "\n".join(rows) + "\n" + _causes(answers)


def _summary(answers: dict[str, dict[str, Any]]) -> str:
    """How many models pass each check, and all of them; a model that is not captured passes none."""
    passed = {check: sum(found.get(check, [False])[0] for found in answers.values()) for check in CHECKS}
    for name, checks in (("**all in PyTorch**", PYTORCH), ("**and ONNX**", (*PYTORCH, "onnx", "sizes"))):
        passed[name] = sum(all(found.get(check, [False])[0] for check in checks) for found in answers.values())
    shares = [found["token_share"] for found in answers.values() if "token_share" in found]
    asked = f"{len(answers)} of {len(zoo())} models were asked"
    rows = [f"| {name} | {count} of {len(answers)} | {count / len(answers):.1%} |" for name, count in passed.items()]
    return "\n".join(
        [
            f"{asked}. The median share of token MACs in branches is {statistics.median(shares):.1%}.",
            "",
            "| check | passed by | |",
            "|---|---|---|",
            *rows,
            "",
            "[At the end](#what-is-not-passed) stands what is not passed, with its cause. The table shows:",
        ]
    )


def _row(name: str, found: dict[str, Any]) -> str:
    if not found["captures"][0]:
        return f"| {name} | not captured |" + " |" * (len(SHOWN) + 2)
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
    cells = ["" if check not in found else found[check][1] if found[check][0] else "**no**" for check in SHOWN]
    seconds = f"{found['capture_seconds']} s" if "capture_seconds" in found else ""
    strategy = found["captures"][1].removeprefix("export, ")
    return f"| {name} | {strategy} | {kinds} | " + " | ".join([*cells, seconds]) + " |"


def _causes(answers: dict[str, dict[str, Any]]) -> str:
    """What the zoo does not pass, with its cause; a failure that nobody has explained shows what was seen."""
    failures, outside = [], []
    for name, found in sorted(answers.items()):
        known = FAILING.get(name, {})
        failed = [check for check in CHECKS if check in found and not found[check][0]]
        failures += [f"- {name}, {check}: {known.get(check) or found[check][1]}" for check in failed]
        outside += [f"- {name}, {path}: {why}" for path, why in OUTSIDE.get(name, {}).items()]
    sections = {"What is not passed": failures, "Attention outside of branches": outside}
    return "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items() if lines)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    answers = {name: found for name, found in answers.items() if name in zoo()}
    for name in names or zoo():
        start = time.perf_counter()
        answers[name] = ask(subject(name))
        failed = [check for check in CHECKS if check in answers[name] and not answers[name][check][0]]
        print(f"{name}: {', '.join(failed) or 'passes'} ({time.perf_counter() - start:.0f} s)", flush=True)
        keep(answers)
        (DOCS / "coverage.md").write_text(page(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
