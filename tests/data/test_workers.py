"""The same work in many processes: errors come at once, results in order."""

import time
from collections.abc import Callable

import pytest

from bowstore.data.workers import run_jobs
from bowstore.errors import DataError

PATIENCE_SECONDS = 60.0


def wait_or_fail(job: str, report: Callable[[int], None]) -> str:
    """ "fail" fails; "wait" waits until it is told to stop, or loses patience."""
    if job == "fail":
        raise DataError("this one fails")
    begun = time.monotonic()
    while job == "wait" and time.monotonic() - begun < PATIENCE_SECONDS:
        time.sleep(0.01)
        report(1)
    return job


def test_results_come_in_order_and_progress_adds_up() -> None:
    heard: list[int] = []
    assert list(run_jobs(wait_or_fail, ["a", "b", "c"], 2, heard.append)) == ["a", "b", "c"]
    assert sum(heard) == 0


def test_an_error_is_raised_before_earlier_jobs_end() -> None:
    begun = time.monotonic()
    with pytest.raises(DataError, match="this one fails"):
        list(run_jobs(wait_or_fail, ["wait", "fail"], 2, lambda amount: None))
    assert time.monotonic() - begun < PATIENCE_SECONDS / 2
