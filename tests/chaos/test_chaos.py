"""Chaos, short: see tests.chaos.run, which goes on for longer."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.run import KINDS, Plan, run, start_site
from tests.support.cluster import Site

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture
def started() -> Iterator[tuple[Site, list[str]]]:
    """Three LP workers and an HP, and a predictor."""
    # Socket paths are limited to about a hundred bytes, which pytest's own directories use up.
    with tempfile.TemporaryDirectory(prefix="ascendra-") as folder:
        site, workers = start_site(Path(folder), 4, step_s=0.05)
        try:
            yield site, workers
        finally:
            site.stop()


async def test_nothing_is_lost_in_chaos(started: tuple[Site, list[str]]) -> None:
    """Workers are killed, stopped, cut off and restarted, routers too: every stream ends with exactly its tokens."""
    site, workers = started
    plan = Plan(seconds=120.0, streams=40, every_s=5.0, router_every_s=30.0)
    report = await run(plan, site, workers)
    print(report.numbers())
    assert report.failures == []
    assert len(report.disturbances) >= 15
    told = " ".join(report.disturbances)
    assert all(kind in told for kind in (*KINDS, "router 0", "router 1"))
    assert len(report.recordings) > plan.streams
    assert report.moved_gaps_s()
    growth = report.growth()
    assert set(growth) == {"predictor", "router 0", "router 1", *workers}
    for name, ratio in growth.items():
        assert ratio < 1.3, f"{name} grew {ratio:.2f}-fold"
