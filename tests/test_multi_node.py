"""A node that dies and comes back; the work is in multi_node.py, which also runs by itself."""

import os

import multi_node
import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not os.environ.get("NANOCHAT_SLOW"), reason="takes a minute; NANOCHAT_SLOW=1 runs it"
)
def test_a_node_dies_and_comes_back() -> None:
    reason = multi_node.reason_not_to()
    if reason is not None:
        pytest.skip(reason)
    outcome = multi_node.main()
    assert outcome["killed_processes"] >= 2, "torchrun and its rank"
    assert multi_node.KILL_AFTER <= outcome["killed_after_step"] < multi_node.STEPS
    assert outcome["resumed"] == 1
    assert outcome["same_losses"]
    assert outcome["same_parameters"]
