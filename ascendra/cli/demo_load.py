"""The demo's load: two classes of requests, sent open-loop, and what became of them."""

import asyncio
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ascendra.errors import AscendraError
from ascendra.session import Session
from ascendra.types import Message, Receipt, SamplingParams, Slo

TOPICS = ("a list", "json", "asyncio", "a decorator", "threading", "pathlib", "a generator", "sqlite3", "a set",
          "logging", "subprocess", "a dictionary", "unittest", "random", "socket", "a class")  # fmt: skip
_REGULARITY = 4.0
"""Shape of the gaps between bursts: 1 is a Poisson process, more is more even; a short demo needs an even one."""
_SENTENCES = (
    "The module keeps a list of open files and closes them in the order in which they were opened.",
    "A call returns at once and the result is delivered later, through the object that was returned.",
    "When the limit is reached the oldest entry is dropped and a warning is written to the log.",
    "Every argument has a default, so that the function can be called without any of them.",
    "The second form takes a sequence and returns a dictionary with one entry for each of its items.",
    "An exception that is raised while the block runs is passed on after the cleanup was done.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadClass:
    """One kind of request."""

    name: str
    """Name of the SLO class."""
    slo: Slo
    share: float
    """Share of the requests, 0 to 1."""
    burst: int
    """Requests that come together."""
    sentences: int
    """Sentences of context in the prompt; 0: a short question."""
    max_tokens: int

    def messages(self, rng: random.Random) -> list[Message]:
        """Return a conversation."""
        topic = rng.choice(TOPICS)
        if not self.sentences:
            return [Message("user", f"What is {topic}?")]
        text = " ".join(rng.choices(_SENTENCES, k=self.sentences))
        return [Message("user", f"{text} Given all this, explain {topic}.")]


@dataclass(slots=True)
class Outcome:
    """What the client saw of one request."""

    load_class: LoadClass
    request_id: str
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    receipt: Receipt | None = None
    error: str = ""

    @property
    def p99_gap_s(self) -> float:
        """99th percentile of the gaps, in seconds; 0 with fewer than two tokens."""
        return percentile(self.gaps_s, 0.99)

    @property
    def attained(self) -> bool:
        """Whether it ended well and both objectives were met, as seen by the client."""
        slo = self.load_class.slo
        if self.ttft_s is None or self.receipt is None:
            return False
        within_ttft = slo.ttft_ms is None or self.ttft_s * 1000 <= slo.ttft_ms
        return within_ttft and (slo.tbt_ms is None or self.p99_gap_s * 1000 <= slo.tbt_ms)


async def run_load(
    session: Session,
    classes: Sequence[LoadClass],
    *,
    rate_rps: float,
    seconds: float,
    seed: int,
    outcomes: list[Outcome],
) -> None:
    """Send requests at random times, whether or not earlier ones have ended; returns when all have.

    Args:
        session: where to send them.
        classes: kinds of requests; their shares add up to 1.
        rate_rps: mean rate in requests per second.
        seconds: how long to send.
        seed: of times and prompts.
        outcomes: receives one entry for each request, in the order of sending.
    """
    async with asyncio.TaskGroup() as tasks:
        for load_class in classes:
            rng = random.Random(f"{seed} {load_class.name}")
            tasks.create_task(_arrivals(session, load_class, rate_rps, seconds, rng, outcomes))


async def _arrivals(
    session: Session,
    load_class: LoadClass,
    rate_rps: float,
    seconds: float,
    rng: random.Random,
    outcomes: list[Outcome],
) -> None:
    """Send the requests of one class, in bursts at random times."""
    mean_gap_s = load_class.burst / (rate_rps * load_class.share)
    began_s = time.monotonic()
    at_s = rng.uniform(0, mean_gap_s)
    async with asyncio.TaskGroup() as tasks:
        while at_s < seconds:
            await asyncio.sleep(began_s + at_s - time.monotonic())
            for _ in range(load_class.burst):
                outcome = Outcome(load_class, f"demo-{load_class.name}-{len(outcomes)}")
                outcomes.append(outcome)
                tasks.create_task(_send(session, outcome, load_class.messages(rng)))
            at_s += rng.gammavariate(_REGULARITY, mean_gap_s / _REGULARITY)


async def _send(session: Session, outcome: Outcome, messages: list[Message]) -> None:
    load_class = outcome.load_class
    sent_s = previous_s = time.monotonic()
    try:
        async for chunk in session.stream(
            messages=messages,
            request_id=outcome.request_id,
            slo=load_class.slo,
            slo_class=load_class.name,
            sampling=SamplingParams(temperature=0.7, max_tokens=load_class.max_tokens, ignore_eos=True),
            timeout_s=90,
        ):
            now_s = time.monotonic()
            for _ in chunk.token_ids:  # tokens that came together have no gap between them
                if outcome.ttft_s is None:
                    outcome.ttft_s = now_s - sent_s
                else:
                    outcome.gaps_s.append(now_s - previous_s)
                previous_s = now_s
            if chunk.finished is not None:
                outcome.receipt = chunk.finished.receipt
    except AscendraError as error:
        outcome.error = str(error)


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value with at least this share of the values at or below it; 0 without values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
