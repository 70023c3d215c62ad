"""The table of hosts says what ran."""

from __future__ import annotations

import pytest

from project.hosts import HOSTS, ROOT, Host, read_records, table, written_table


def test_the_table_is_that_of_the_records() -> None:
    assert written_table() == table(read_records())


def test_no_record_is_of_a_host_that_is_gone() -> None:
    assert set(read_records()) <= {host.name for host in HOSTS}
    assert [name for name, record in read_records().items() if record["failed"] or not record["passed"]] == []


@pytest.mark.parametrize("host", HOSTS, ids=[host.name for host in HOSTS])
def test_its_tests_are_there(host: Host) -> None:
    assert all((ROOT / "tests" / test.partition("::")[0]).is_file() for test in host.tests)
