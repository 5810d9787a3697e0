"""Chaos, short: see tests.cluster.chaos, which runs it for longer."""

import pytest

from tests.cluster import chaos
from tests.support.cluster import Site

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


async def test_nothing_is_lost_in_chaos(site: Site) -> None:
    """Workers are killed, stopped and restarted, and a router is: every stream ends with exactly its tokens."""
    plan = chaos.Plan(seconds=60.0, streams=60)
    report = await chaos.run(plan, site, ["lp-0", "lp-1", "lp-2", "hp"])
    print(report.summary())
    assert report.failures == []
    assert len(report.disturbances) >= 6
    assert "kill and restart a router" in " ".join(report.disturbances)
    assert len(report.recordings) > plan.streams
    assert report.moved_gaps_s()
    survivors = report.growth()
    assert set(survivors) >= {"router 1", "predictor"}
    for name, ratio in survivors.items():
        assert ratio < 1.3, f"{name} grew {ratio:.2f}-fold"
