"""The fleet of real workers that the tests of the worker share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.worker_process import WorkerFleet, cpu_worker, emulated_worker


@pytest.fixture(scope="session")
def fleet(tiny_model: Path) -> Iterator[WorkerFleet]:
    """Workers, once a session; tests must leave their roles and policies as they found them.

    "cpu" and "cpu-async" run the tiny model under our policies; "emulated" does so on A100 step times, and logs its
    steps in steps.jsonl;
    "emulated-stock" is plain vLLM scheduling; "emulated-slots" has two slots, and
    "emulated-priority" too, under vLLM's own priorities; "leaver" is stopped by one test, "kv-source" is killed;
    "mortal" may be killed and drained, and comes back; it reports to predictor.sock and registers at router.sock,
    where a test may listen.
    """
    # Socket paths are limited to about a hundred bytes, which pytest's own directories use up.
    with tempfile.TemporaryDirectory(prefix="ascendra-") as directory:
        running = WorkerFleet(Path(directory), _session_workers(tiny_model, Path(directory)), restart=True)
        try:
            running.wait_ready()
            yield running
        finally:
            running.stop()


def _session_workers(tiny_model: Path, directory: Path) -> dict[str, dict[str, Any]]:
    return {
        "cpu": cpu_worker(tiny_model, role="low"),
        "cpu-async": cpu_worker(tiny_model, async_scheduling="on"),
        "kv-source": cpu_worker(tiny_model, kv_lease_s=6),
        "emulated": emulated_worker(step_log=str(directory / "steps.jsonl")),
        "emulated-stock": emulated_worker(value_function="fcfs", token_budget="static", relegation="none"),
        "emulated-slots": emulated_worker(max_num_seqs=2, relegation="none"),
        "emulated-priority": emulated_worker(max_num_seqs=2, scheduler="stock"),
        "leaver": emulated_worker(),
        "mortal": emulated_worker(
            predictor=f"unix:{directory / 'predictor.sock'}",
            routers=[f"unix:{directory / 'router.sock'}"],
            register_ttl_ms=900,
        ),
    }
