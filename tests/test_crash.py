"""A short crash test; `python -m tests.crash_test --kills 30` is the long one."""

import crash_test
import pytest


@pytest.mark.timeout(600)
def test_killed_runs_end_as_the_uninterrupted_ones() -> None:
    result = crash_test.main(kills=4, seed=0)
    assert result["kills"] == 4
    assert set(result["stages"]) == {"base", "mid", "sft", "rl"}
    assert result["in_a_save"] >= 1
    assert result["verified"] >= 4
    assert result["wrong"] == []
