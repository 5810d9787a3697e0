"""Streams against a cluster whose processes are killed, stopped, cut off and restarted at random.

`python -m tests.chaos.run --out bench/results/chaos.json` disturbs 8 workers under 300 streams every 10 s for 10
minutes, and kills one of two routers every minute. It prints what happened and exits with 1 if anything was lost,
repeated, reordered, wrong or hung, or a stream ended without a finish reason.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from ascendra import AsyncClient, Slo
from services.policy.step_time import StepTimeBin, StepTimeModel
from tests.support.cluster import Service, Site, attached, running
from tests.support.fault_proxy import FaultProxy, proxies
from tests.support.load import Load, Recording, random_prompts, undisturbed
from tests.support.tiny_model import VOCAB_SIZE, shared_tiny_model
from tests.support.worker_process import emulated_worker

SESSIONS = 2
TOKENS = (10, 200)
AWAY_S = 3.0
"""How long a worker is stopped or cut off; longer than it takes to be noticed."""
STEP_S = 0.1
"""Of the emulated workers, unless told otherwise: 300 streams then are 3,000 tokens a second."""
OBJECTIVE = Slo(ttft_ms=20_000, tbt_ms=1000)
KINDS = ("kill front end", "kill engine core", "stop", "cut off", "restart")
_SAMPLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do."""

    seconds: float
    streams: int
    routers: int = 2
    every_s: float = 10.0
    """Time between two disturbances of workers."""
    router_every_s: float = 60.0
    """Time between two deaths of routers."""
    seed: int = 0


@dataclass
class Report:
    """What happened."""

    recordings: list[Recording] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    disturbances: list[str] = field(default_factory=list)
    rss_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Samples by name of the service, through all lives of its process."""
    lives: Counter[str] = field(default_factory=Counter)
    """Processes that a service was seen in."""

    def moved_gaps_s(self) -> list[float]:
        """Return the largest gaps of the streams that went on elsewhere after their first token, sorted."""
        return sorted(recording.largest_gap_s for recording in self.recordings if recording.moved_running)

    def growth(self) -> dict[str, float]:
        """Return mean resident memory in the last quarter over that in the first quarter, by service."""
        ratios = {}
        for name, samples in self.rss_bytes.items():
            quarter = max(len(samples) // 4, 1)
            ratios[name] = statistics.fmean(samples[-quarter:]) / statistics.fmean(samples[:quarter])
        return ratios

    def numbers(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        gaps = self.moved_gaps_s()
        unmoved = sorted(recording.largest_gap_s for recording in self.recordings if not recording.moved_running)
        finished = [recording.finished for recording in self.recordings if recording.finished is not None]
        return {
            "streams": len(self.recordings),
            "failed": len(self.failures),
            "tokens": sum(len(recording.token_ids) for recording in self.recordings),
            "finish_reasons": Counter(str(end.reason) for end in finished),
            "moved_after_first_token": len(gaps),
            "moved_largest_gap_p50_s": round(_quantile(gaps, 0.5), 3),
            "moved_largest_gap_p99_s": round(_quantile(gaps, 0.99), 3),
            "unmoved_largest_gap_p50_s": round(_quantile(unmoved, 0.5), 3),
            "unmoved_largest_gap_p99_s": round(_quantile(unmoved, 0.99), 3),
            "disturbances": self.disturbances,
            "rss_last_over_first_quarter": {name: round(ratio, 3) for name, ratio in sorted(self.growth().items())},
            "processes": dict(sorted(self.lives.items())),
            "failures": self.failures[:20],
        }


class Chaos:
    """Disturbs a cluster."""

    def __init__(
        self, site: Site, network: dict[str, FaultProxy], routers: list[Service], plan: Plan, report: Report
    ) -> None:
        """Prepare; `network` has the proxy in front of each worker."""
        self._site = site
        self._network = network
        self._workers = list(network)
        self._routers = routers
        self._plan = plan
        self._report = report
        self._rng = random.Random(plan.seed)
        self._began_s = time.monotonic()

    async def run(self) -> None:
        """Disturb a worker at every interval, all kinds in random order before one comes again, and routers in turn."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._disturb_workers())
            if len(self._routers) > 1:
                tasks.create_task(self._kill_routers())

    async def _disturb_workers(self) -> None:
        kinds: list[str] = []
        while (began_s := time.monotonic()) < self._began_s + self._plan.seconds or kinds:
            if not kinds:
                kinds = self._rng.sample(KINDS, len(KINDS))
            await self._disturb(kinds.pop())
            await asyncio.sleep(max(self._plan.every_s - (time.monotonic() - began_s), 0))

    async def _kill_routers(self) -> None:
        for number in range(1, int(self._plan.seconds / self._plan.router_every_s) + 1):
            due_s = self._began_s + (number - 0.5) * self._plan.router_every_s
            await asyncio.sleep(max(due_s - time.monotonic(), 0))
            await self._kill_router(number % len(self._routers))

    async def _disturb(self, kind: str) -> None:
        worker_id = self._rng.choice(self._workers)
        old_pid = self._site.fleet.pid(worker_id)
        self._note(f"{kind} {worker_id}")
        if kind == "cut off":
            self._network[worker_id].cut()
            await asyncio.sleep(AWAY_S)
            self._network[worker_id].heal()
            return
        if kind == "stop":
            self._site.signal_worker(worker_id, signal.SIGSTOP)
            await asyncio.sleep(AWAY_S)
            self._site.signal_worker(worker_id, signal.SIGCONT)
            return
        if kind == "kill engine core":
            os.kill(self._site.fleet.engine_core_pid(worker_id), signal.SIGKILL)
        else:
            os.kill(old_pid, signal.SIGKILL if kind == "kill front end" else signal.SIGTERM)
        await self._site.restarted(worker_id, old_pid)

    async def _kill_router(self, number: int) -> None:
        self._note(f"kill and restart router {number}")
        router = self._routers[number]
        await asyncio.to_thread(router.kill)
        await asyncio.to_thread(router.start)

    def _note(self, what: str) -> None:
        self._report.disturbances.append(f"{time.monotonic() - self._began_s:.1f} s: {what}")


async def run(plan: Plan, site: Site, workers: list[str]) -> Report:
    """Run chaos on some workers of a site and return what happened."""
    async with proxies([site.address(worker_id) for worker_id in workers]) as network:
        return await _run(plan, site, dict(zip(workers, network, strict=True)))


async def _run(plan: Plan, site: Site, network: dict[str, FaultProxy]) -> Report:
    report = Report()
    tokenizer = Tokenizer.from_file(str(site.model / "tokenizer.json"))
    addresses = [proxy.address for proxy in network.values()]
    routers = [site.router_at(addresses, silence_s=0.8, stall_s=0.9) for _ in range(plan.routers)]
    async with running(*routers, workers=len(network)) as client:
        prompts = random_prompts(24, (10, 600), seed=plan.seed, vocab_size=VOCAB_SIZE)
        cases = await undisturbed(client, prompts, TOKENS[1])
        sessions = [client.session() for _ in range(SESSIONS)]
        load = Load(
            [client, *sessions], cases, tokenizer, streams=plan.streams, tokens=TOKENS, seed=plan.seed, slo=OBJECTIVE
        )
        pids: dict[str, Callable[[], int]] = {"predictor": lambda: site.predictor.pid}
        for number, router in enumerate(routers):
            pids[f"router {number}"] = lambda router=router: router.pid  # type: ignore[misc]
        for name in network:
            pids[name] = lambda name=name: site.fleet.pid(name)  # type: ignore[misc]
        sampling = asyncio.create_task(_sample_memory(pids, report))
        try:
            async with load:
                await Chaos(site, network, routers, plan, report).run()
        finally:
            sampling.cancel()
            for session in sessions:
                await session.close()
        await asyncio.gather(sampling, return_exceptions=True)
        for router in routers:
            async with AsyncClient(router.address) as one:
                await attached(one, len(network))
                assert (await one.status()).live_requests == 0
    report.recordings, report.failures = load.recordings, load.failures
    return report


async def _sample_memory(pids: dict[str, Callable[[], int]], report: Report) -> None:
    """Sample the present process of each service until cancelled."""
    seen: set[tuple[str, int]] = set()
    while True:
        for name, pid_of in pids.items():
            pid = pid_of()
            try:
                rss_bytes = psutil.Process(pid).memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it is being started again
            report.rss_bytes.setdefault(name, []).append(rss_bytes)
            if (name, pid) not in seen:
                seen.add((name, pid))
                report.lives[name] += 1
        await asyncio.sleep(_SAMPLE_S)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def start_site(directory: Path, workers: int, step_s: float = STEP_S) -> tuple[Site, list[str]]:
    """Start emulated workers, one in four of them HP; return the site and their ids."""
    ids = [f"worker-{number}" for number in range(workers)]
    steady = StepTimeModel((StepTimeBin(0, a0=step_s, a2=2e-5),), source="steady")
    profile = directory / "steady.json"
    profile.write_text(json.dumps(steady.to_dict()))
    common = {"vocab_size": VOCAB_SIZE, "served_model_name": "tiny", "drain_timeout_s": 1.5}
    configurations = {
        worker_id: emulated_worker(role="high" if number % 4 == 3 else "low", step_time_profile=str(profile), **common)
        for number, worker_id in enumerate(ids)
    }
    site = Site(directory, configurations, shared_tiny_model())
    try:
        site.start()
    except BaseException:
        site.stop()
        raise
    return site, ids


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to disturb")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=300, help="streams at any time")
    parser.add_argument("--every-s", type=float, default=10.0, help="seconds between two disturbances of workers")
    parser.add_argument("--router-every-s", type=float, default=60.0, help="seconds between two deaths of routers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    plan = Plan(
        seconds=options.minutes * 60,
        routers=options.routers,
        streams=options.streams,
        every_s=options.every_s,
        router_every_s=options.router_every_s,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory(prefix="ascendra-") as folder:
        site, workers = start_site(Path(folder), options.workers)
        try:
            report = asyncio.run(run(plan, site, workers))
        finally:
            site.stop()
    text = json.dumps({"plan": asdict(plan), "workers": options.workers, **report.numbers()}, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
