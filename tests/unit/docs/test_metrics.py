"""The list of metrics is what the services define, under the names that it promises."""

import re

import pytest

from services.router.metrics import REASONS
from tools.reference.__main__ import ROOT
from tools.reference.metrics import SERVICES, metrics_of


@pytest.mark.parametrize("service", SERVICES)
def test_names(service: str) -> None:
    """Ours begin with ascendra_ and the service's name, and every metric says what it means."""
    entries = metrics_of(service)
    assert len({entry.name for entry in entries}) == len(entries) > 5
    for entry in entries:
        assert entry.name.startswith((f"ascendra_{service}_", "vllm:"))
        assert entry.meaning
        assert "ms" not in entry.name.split("_"), "times are in seconds"


@pytest.mark.parametrize("service", SERVICES)
def test_metrics_are_defined_in_one_module_of_each_service(service: str) -> None:
    """The list would miss others."""
    for file in (ROOT / "services" / service).rglob("*.py"):
        assert file.name == "metrics.py" or "prometheus_client import Counter" not in file.read_text(encoding="utf-8")


def test_reasons_of_the_code_are_known_labels() -> None:
    """Every reason that router or worker give for an error has a label value of its own."""
    given = set()
    for file in [*(ROOT / "services/router").rglob("*.py"), *(ROOT / "services/worker").rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        given |= set(re.findall(r'reason="([A-Z_]+)"', text))
        given |= set(re.findall(r'(?:failed|_lost|_refusal)\([^()]*(?:\([^()]*\)[^()]*)*"([A-Z_]{4,})"', text))
    assert {"SLOW_READER", "LIVE_LIMIT", "ENGINE_DIED", "WORKER_LOST"} <= given
    assert {reason.lower() for reason in given} - REASONS <= {"unknown_worker", "unknown_request"}
