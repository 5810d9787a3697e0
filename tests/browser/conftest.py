"""A headless Chromium, and a cluster of emulated workers under a load for it to look at."""

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from tests.support.cluster import Service
from tests.support.gateway_process import GatewayProcess
from tests.support.worker_process import WorkerFleet, emulated_worker


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    """A browser with a window of 1440 x 1540."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("this needs Chromium: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1440,1540"):
        options.add_argument(f"--{argument}")
    chrome = Chrome(options=options, service=ChromeService(driver))
    chrome.set_page_load_timeout(60)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="session")
def gateway(tiny_model: Path) -> Iterator[str]:
    """Address of a gateway in front of a router, an LP and an HP worker."""
    workers = {
        name: emulated_worker(role=role, model=str(tiny_model), served_model_name="tiny", max_model_len=2048)
        for name, role in (("lp-0", "low"), ("hp-0", "high"))
    }
    with contextlib.ExitStack() as stack:
        # Socket paths are limited to about a hundred bytes, which pytest's own directories use up.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ascendra-")))
        fleet = stack.enter_context(WorkerFleet(directory, workers))
        options = {
            "listen": "127.0.0.1:0",
            "workers": [fleet.address(name) for name in workers],
            "model": str(tiny_model),
            "model-name": "tiny",
            "router-id": "router-0",
        }
        router = Service(directory, "router", "router", options).start()
        stack.callback(router.stop)
        gateway = stack.enter_context(GatewayProcess(directory / "gateway.log", [router.ready["address"]]))
        yield gateway.address


class Load:
    """Streams that begin one after the other on a thread, until it is left; some ask for what cannot be had."""

    def __init__(self, address: str, *, interval_s: float = 0.12) -> None:
        self._address = address
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(120)

    async def _run(self) -> None:
        http = httpx.AsyncClient(base_url=f"http://{self._address}", timeout=120, verify=False)
        async with http as client, asyncio.TaskGroup() as group:
            number = 0
            while not self._stop.is_set():
                group.create_task(self._one(client, number))
                number += 1
                await asyncio.sleep(self._interval_s)

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        hopeless = number % 25 == 7  # no step can take 1,800 tokens within the 50 ms that are the least one gets
        prompt = [2 + (number * 31 + i * 7) % 500 for i in range(1800 if hopeless else 60 + (number * 97) % 900)]
        body = {
            "prompt": prompt,
            "max_tokens": 20 + (number * 13) % 60,
            "ignore_eos": True,
            "stream": True,
            "slo_class": ("interactive", "interactive", "batch")[number % 3],
        }
        headers = {"x-request-id": f"load-{number}", **({"x-slo-ttft-ms": "50"} if hopeless else {})}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        if answer.status_code != 200:
            self.failures.append(answer.text)
