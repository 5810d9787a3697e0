"""The console in a browser, while the cluster works: its numbers move, agree with /metrics, and explain requests.

`CONSOLE_PNG=docs/console.png make test-browser` also takes the picture of the README.
"""

import os
import re
import time
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.browser.conftest import Load
from tests.support.cluster import START_TIMEOUT_S

pytestmark = [pytest.mark.engine, pytest.mark.browser, pytest.mark.timeout(600)]
WAIT_S = 60.0


def eventually(what: str, condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Wait until something holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def text(chromium: Chrome, selector: str) -> str:
    """Return what an element shows, at one moment: the page replaces its elements all the time."""
    script = "return (document.querySelector(arguments[0]) || {textContent: ''}).textContent"
    return str(chromium.execute_script(script, selector))


def number(chromium: Chrome, selector: str) -> int:
    """Return the first number that an element shows, -1 without one."""
    found = re.search(r"[\d,]+", text(chromium, selector))
    return int(found[0].replace(",", "")) if found else -1


def metrics(gateway: str) -> dict[str, float]:
    """Return /metrics, summed over the labels."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"http://{gateway}/metrics", verify=False).text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def test_console_during_a_live_load(chromium: Chrome, gateway: str) -> None:
    """Numbers move while requests run, equal /metrics when they have ended, and a click shows why one went where."""
    chromium.get(f"http://{gateway}/")
    ready = "2 of 2 workers ready"
    eventually("both workers to be ready", lambda: ready in text(chromium, "#state"), timeout_s=START_TIMEOUT_S)
    assert "no requests yet" in text(chromium, "#recent")
    with Load(gateway) as load:
        eventually("requests to run", lambda: number(chromium, "#tile-running") > 0)
        eventually("tokens to flow", lambda: number(chromium, "#tile-tokens") > 0)
        eventually("requests to end", lambda: number(chromium, "#tile-requests") > 0)
        seen = number(chromium, "#tile-requests")
        eventually("more requests to end", lambda: number(chromium, "#tile-requests") > seen)
        eventually("a miss to be seen", lambda: "missed" in text(chromium, "#recent"))
        eventually("attainment to be shown", lambda: "interactive" in text(chromium, "#attainment"))
        if file := os.environ.get("CONSOLE_PNG"):
            take_picture(chromium, file)
    assert not load.failures
    eventually("the cluster to be idle", lambda: number(chromium, "#tile-running") == 0)
    found = metrics(gateway)
    answered, tokens = found["ascendra_gateway_requests_total"], found["ascendra_gateway_tokens_total"]
    eventually("all requests to be counted", lambda: number(chromium, "#tile-requests") == answered)
    assert f"{int(tokens):,} tokens" in text(chromium, "#tile-requests + .note")
    assert number(chromium, "#tile-running") == found["vllm:num_requests_running"] == 0
    assert number(chromium, "#tile-waiting") == found["vllm:num_requests_waiting"] == 0

    chromium.find_element(By.ID, "missed").click()
    eventually(
        "only notable requests to be listed", lambda: all(met != "met" or why for met, why in outcomes(chromium))
    )
    missed = [met for met, _ in outcomes(chromium)].index("missed")
    chosen = rows(chromium, "#recent td:nth-child(2)")[missed]
    chromium.execute_script("document.querySelectorAll('#recent tr.pick')[arguments[0]].click()", missed)
    eventually("the timeline", lambda: "place" in rows(chromium, "#timeline td:nth-child(3)"))
    kinds = rows(chromium, "#timeline td:nth-child(3)")
    assert "first token" in kinds
    assert all(rows(chromium, "#timeline td:nth-child(7)")), "every decision has a reason"
    assert "missed" in text(chromium, "#summary")
    assert chromium.current_url.endswith(f"#{chosen}")
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]


def outcomes(chromium: Chrome) -> list[tuple[str, str]]:
    """Return outcome and remarks of the listed requests."""
    met, remarks = rows(chromium, "#recent td:nth-child(4)"), rows(chromium, "#recent td:last-child")
    return list(zip(met, remarks, strict=True))


def rows(chromium: Chrome, selector: str) -> list[str]:
    """Return the texts of all elements."""
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return list(chromium.execute_script(script, selector))


def take_picture(chromium: Chrome, file: str) -> None:
    """Save the page under load, with the timeline of the request that was placed most often."""
    eventually("figures of half a minute", lambda: number(chromium, "#tile-requests") > 200, timeout_s=120)
    chromium.execute_script(
        "const placed = (line) => parseInt(line.lastElementChild.textContent) || 1;"
        "[...document.querySelectorAll('#recent tr.pick')].sort((a, b) => placed(b) - placed(a))[0].click()"
    )
    eventually("the timeline", lambda: "place" in rows(chromium, "#timeline td:nth-child(3)"))
    time.sleep(1)
    chromium.save_screenshot(file)
