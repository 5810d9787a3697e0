"""Streams against a cluster whose processes are killed, stopped and restarted at random.

`python -m tests.cluster.chaos --minutes 10 --workers 8 --streams 300` prints what happened and exits with 1 if
anything was lost, repeated, reordered, wrong or hung.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tokenizers import Tokenizer

from ascendra import AsyncClient
from tests.cluster.load import Load, Recording, random_prompts, undisturbed
from tests.support.cluster import Service, Site, attached, running
from tests.support.tiny_model import VOCAB_SIZE, shared_tiny_model
from tests.support.worker_process import emulated_worker

SESSIONS = 2
TOKENS = (10, 200)
STOPPED_S = 2.0
SILENT_HEARTBEATS = 6
"""A worker silent for so long, 1.5 s, is given up, so that a stop is noticed."""
_SAMPLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do."""

    seconds: float = 75.0
    routers: int = 2
    streams: int = 60
    every_s: float = 5.0
    """Time between two disturbances of workers."""
    seed: int = 0


@dataclass
class Report:
    """What happened."""

    recordings: list[Recording] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    disturbances: list[str] = field(default_factory=list)
    rss_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Samples of the processes that lived from beginning to end, by name."""

    def moved_gaps_s(self) -> list[float]:
        """Return the largest gaps of the streams that went on elsewhere after their first token, sorted."""
        return sorted(recording.largest_gap_s for recording in self.recordings if recording.moved_running)

    def growth(self) -> dict[str, float]:
        """Return mean resident memory in the last quarter over that in the first quarter, by process."""
        ratios = {}
        for name, samples in self.rss_bytes.items():
            quarter = max(len(samples) // 4, 1)
            ratios[name] = statistics.fmean(samples[-quarter:]) / statistics.fmean(samples[:quarter])
        return ratios

    def summary(self) -> str:
        """Return the numbers as JSON."""
        gaps = self.moved_gaps_s()
        numbers = {
            "streams": len(self.recordings),
            "failed": len(self.failures),
            "tokens": sum(len(recording.token_ids) for recording in self.recordings),
            "moved_after_first_token": len(gaps),
            "moved_gap_p50_s": round(_quantile(gaps, 0.5), 3),
            "moved_gap_p99_s": round(_quantile(gaps, 0.99), 3),
            "disturbances": self.disturbances,
            "rss_growth": {name: round(ratio, 3) for name, ratio in self.growth().items()},
            "failures": self.failures[:20],
        }
        return json.dumps(numbers, indent=2)


class Chaos:
    """Disturbs a cluster."""

    def __init__(self, site: Site, workers: list[str], routers: list[Service], plan: Plan, report: Report) -> None:
        self._site = site
        self._workers = workers
        self._routers = routers
        self._plan = plan
        self._report = report
        self._rng = random.Random(plan.seed)
        self._began_s = time.monotonic()

    async def run(self) -> None:
        """Disturb workers at every interval, and a router midway."""
        kinds = itertools.cycle(["kill front end", "stop", "kill engine core", "restart"])
        halfway_s = self._began_s + self._plan.seconds / 2
        router_killed = len(self._routers) < 2
        while (now_s := time.monotonic()) < self._began_s + self._plan.seconds:
            if not router_killed and now_s >= halfway_s:
                router_killed = True
                await self._kill_router(self._routers[0])
            began_s = time.monotonic()
            await self._disturb(next(kinds))
            await asyncio.sleep(max(self._plan.every_s - (time.monotonic() - began_s), 0))

    async def _disturb(self, kind: str) -> None:
        worker_id = self._rng.choice(self._workers)
        old_pid = self._site.fleet.pid(worker_id)
        self._note(f"{kind} {worker_id}")
        if kind == "stop":
            self._site.signal_worker(worker_id, signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            self._site.signal_worker(worker_id, signal.SIGCONT)
            return
        if kind == "kill engine core":
            os.kill(self._site.fleet.engine_core_pid(worker_id), signal.SIGKILL)
        else:
            os.kill(old_pid, signal.SIGKILL if kind == "kill front end" else signal.SIGTERM)
        await self._site.restarted(worker_id, old_pid)

    async def _kill_router(self, router: Service) -> None:
        self._note("kill and restart a router")
        await asyncio.to_thread(router.kill)
        await asyncio.to_thread(router.start)

    def _note(self, what: str) -> None:
        self._report.disturbances.append(f"{time.monotonic() - self._began_s:.1f} s: {what}")


async def run(plan: Plan, site: Site, workers: list[str]) -> Report:
    """Run chaos on some workers of a site and return what happened."""
    report = Report()
    tokenizer = Tokenizer.from_file(str(site.model / "tokenizer.json"))
    routers = [site.router(workers, silence_heartbeats=SILENT_HEARTBEATS) for _ in range(plan.routers)]
    async with running(*routers, workers=len(workers)) as client:
        cases = await undisturbed(
            client, random_prompts(24, (10, 600), seed=plan.seed, vocab_size=VOCAB_SIZE), TOKENS[1]
        )
        sessions = [client.session() for _ in range(SESSIONS)]
        load = Load([client, *sessions], cases, tokenizer, streams=plan.streams, tokens=TOKENS, seed=plan.seed)
        watched = {f"router {number}": router.pid for number, router in enumerate(routers)}
        watched |= {"predictor": site.predictor.pid} | {name: site.fleet.pid(name) for name in workers}
        sampling = asyncio.create_task(_sample_memory(watched, report))
        try:
            async with load:
                await Chaos(site, workers, routers, plan, report).run()
        finally:
            sampling.cancel()
            for session in sessions:
                await session.close()
        await asyncio.gather(sampling, return_exceptions=True)
        for router in routers:
            async with AsyncClient(router.address) as one:
                await attached(one, len(workers))
                assert (await one.status()).live_requests == 0
    report.recordings, report.failures = load.recordings, load.failures
    return report


async def _sample_memory(watched: dict[str, int], report: Report) -> None:
    """Sample processes until cancelled; one that ends is forgotten."""
    processes = {name: psutil.Process(pid) for name, pid in watched.items()}
    while True:
        for name, process in list(processes.items()):
            try:
                report.rss_bytes.setdefault(name, []).append(process.memory_info().rss)
            except psutil.NoSuchProcess:
                del processes[name], report.rss_bytes[name]
        await asyncio.sleep(_SAMPLE_S)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def start_site(directory: Path, workers: int) -> tuple[Site, list[str]]:
    """Start emulated workers, one in four of them HP; return the site and their ids."""
    ids = [f"worker-{number}" for number in range(workers)]
    common = {"vocab_size": VOCAB_SIZE, "served_model_name": "tiny", "drain_timeout_s": 1.5}
    configurations = {
        worker_id: emulated_worker(role="high" if number % 4 == 3 else "low", **common)
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
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.25, help="how long to disturb")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=60, help="streams at any time")
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between two disturbances")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plan = Plan(
        seconds=options.minutes * 60,
        routers=options.routers,
        streams=options.streams,
        every_s=options.every_s,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory(prefix="ascendra-") as folder:
        site, workers = start_site(Path(folder), options.workers)
        try:
            report = asyncio.run(run(plan, site, workers))
        finally:
            site.stop()
    print(report.summary())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
