"""A short crash test; `python -m tests.crash_test --kills 30` is the long one."""

import crash_test


def test_killed_runs_end_as_the_uninterrupted_ones() -> None:
    result = crash_test.main(kills=7, seed=0)
    assert result["kills"] == 7
    assert set(result["stages"]) == {*crash_test.TRAINING, *crash_test.DATA}
    assert result["in_a_save"] >= 1
    assert result["verified"] >= 7
    assert result["wrong"] == []
