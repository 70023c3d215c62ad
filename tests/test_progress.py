"""Progress where no bar can be drawn."""

from __future__ import annotations

import pytest

from lazy_compile.progress import progress_bars


def test_a_log_gets_a_line_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("lazy_compile.progress.time.monotonic", lambda: clock[0])
    with progress_bars() as report:
        for done in range(1, 41):
            clock[0] += 1.0
            report("measuring", done, 40, "round 1")
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 15 of 40, round 1",
        "measuring: 30 of 40, round 1",
    ]
    with progress_bars(enabled=False) as report:
        clock[0] += 100.0
        report("measuring", 1, 1)
    assert capsys.readouterr().err == ""
