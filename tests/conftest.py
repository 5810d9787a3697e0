"""Fixtures shared by all tests: the tiny model and one fleet of real workers a session."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.tiny_model import shared_tiny_model
from tests.support.worker_process import WorkerFleet, cpu_worker, emulated_worker

# No time limit by example, for the machine may be busy; and the same examples in every run: what a user runs after a
# clone passes or fails by the code. `HYPOTHESIS_PROFILE=explore make check` looks for others.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Directory of a tiny random Llama with a tokenizer."""
    return shared_tiny_model()


@pytest.fixture(scope="session")
def fleet(tiny_model: Path) -> Iterator[WorkerFleet]:
    """Workers for all engine tests of a session; tests must leave their roles and policies as they found them.

    "cpu" and "cpu-async" run the tiny model under our policies; "emulated" does so on A100 step times;
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
        "emulated": emulated_worker(),
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
