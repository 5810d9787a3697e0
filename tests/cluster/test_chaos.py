"""Chaos, short: see tests.cluster.chaos, which runs it for longer."""

import pytest

from tests.cluster import chaos
from tests.support.cluster import Site

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


async def test_nothing_is_lost_in_chaos(site: Site) -> None:
    """Workers are killed, stopped, cut off and restarted, routers too: every stream ends with exactly its tokens."""
    plan = chaos.Plan(seconds=120.0, streams=40, every_s=5.0, router_every_s=30.0)
    report = await chaos.run(plan, site, ["lp-0", "lp-1", "lp-2", "hp"])
    print(report.numbers())
    assert report.failures == []
    assert len(report.disturbances) >= 15
    told = " ".join(report.disturbances)
    assert all(kind in told for kind in (*chaos.KINDS, "router 0", "router 1"))
    assert len(report.recordings) > plan.streams
    assert report.moved_gaps_s()
    growth = report.growth()
    assert set(growth) == {"predictor", "router 0", "router 1", "lp-0", "lp-1", "lp-2", "hp"}
    for name, ratio in growth.items():
        assert ratio < 1.3, f"{name} grew {ratio:.2f}-fold"
