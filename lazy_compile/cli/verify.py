"""``lazy-compile verify``: a lazy model held against its original."""

from __future__ import annotations

from dataclasses import dataclass

from lazy_compile.cli import shared_options as given
from lazy_compile.cli.shared_options import ModelOptions, SamplingOptions


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(SamplingOptions, ModelOptions):
    """What ``lazy-compile verify`` takes."""

    gates: given.Gates = None
    onnx: given.Onnx = None


def verify(options: VerifyOptions) -> None:
    """Hold a lazy model against its original: bitwise while all compute, a random schedule, the exported model."""
    from lazy_compile.cli.models import load_lazy, load_model, load_sampler
    from lazy_compile.reporting.terminal_tables import check_table, plain, show
    from lazy_compile.verification import compare

    named = load_model(options.model, options.shape or (), options.device)
    lazy = load_lazy(named, options.gates, options.settings or (), options.capture_cache)
    comparison = compare(
        lazy,
        load_sampler(options.sampler, named, lazy, options.steps, options.scheduler),
        onnx=options.onnx,
        seed=options.seed,
    )
    checks = [plain(check) for check in comparison.checks]
    show({"model": options.model, "passed": comparison.passed, "checks": checks}, options.json, check_table(comparison))
    comparison.require()
