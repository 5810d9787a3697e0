"""Streams against a cluster, each compared with what it must be: every token once, in order, and the right ones."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from ascendra import AsyncClient, Attempt, Chunk, Finished, SamplingParams, Session, Slo
from tests.support.cluster import until

Source = AsyncClient | Session
PATIENT = Slo(ttft_ms=120_000, tbt_ms=5_000)
"""An objective that no worker misses, however long its steps."""
CLASS_OBJECTIVE = Slo()
STREAM_LIMIT_S = 120.0
"""A stream that takes longer is hung."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and the greedy tokens that must follow it."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]

    def options(self, tokens: int | None = None) -> dict[str, Any]:
        """Return the options of a request for the first `tokens` of the expected ones; None: all."""
        count = len(self.expected) if tokens is None else tokens
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
        return {"token_ids": self.prompt, "sampling": sampling, "timeout_s": STREAM_LIMIT_S}


@dataclass(slots=True)
class Recording:
    """What a client received of one stream."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    finished: Finished | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the first token."""

    def attempts(self) -> tuple[Attempt, ...]:
        """Return where it was placed, in order."""
        assert self.finished is not None
        return self.finished.receipt.attempts

    @property
    def workers(self) -> list[str]:
        """Workers that it was placed on, in order."""
        return [attempt.worker_id for attempt in self.attempts()]

    @property
    def moved_running(self) -> bool:
        """It went on elsewhere after its first token: on another worker, or through another router."""
        assert self.finished is not None
        return any(attempt.first_token_offset > 0 for attempt in self.finished.receipt.attempts)

    @property
    def largest_gap_s(self) -> float:
        """Longest time between two messages with tokens."""
        return max((after - before for before, after in itertools.pairwise(self.times_s)), default=0.0)

    async def follow(self, chunks: AsyncIterator[Chunk]) -> "Recording":
        """Take a stream to its end. A gap, a repetition or a token after the end is an AssertionError."""
        async with asyncio.timeout(STREAM_LIMIT_S):
            async for chunk in chunks:
                assert self.finished is None, "something follows the last message"
                if chunk.token_ids:
                    assert chunk.token_offset == len(self.token_ids), "the offsets are not contiguous"
                    self.token_ids.extend(chunk.token_ids)
                    self.times_s.append(time.monotonic())
                    self.started.set()
                self.text += chunk.text
                self.finished = chunk.finished
        assert self.finished is not None, "the stream ended without a finish reason"
        return self

    def check(self, expected: Sequence[int], tokenizer: Tokenizer) -> None:
        """Compare with the tokens that must have come, and with their text decoded at once."""
        assert self.finished is not None
        assert tuple(self.token_ids) == tuple(expected)
        assert self.text == tokenizer.decode(list(expected), skip_special_tokens=True)
        assert self.finished.reason == "length"
        assert self.finished.usage.completion_tokens == len(expected)


def random_prompts(count: int, lengths: tuple[int, int], *, seed: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Return prompts of uniform length within limits, of ordinary tokens."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(*lengths))) for _ in range(count)]


async def undisturbed(client: AsyncClient, prompts: Iterable[Sequence[int]], tokens: int) -> list[Case]:
    """Return cases with what the cluster says when nothing else happens to it."""

    async def one(prompt: Sequence[int]) -> Case:
        recording = await Recording().follow(client.stream(**Case(tuple(prompt), (0,) * tokens).options()))
        assert len(recording.token_ids) == tokens
        assert len(set(recording.workers)) <= 2, "it was disturbed"
        return Case(tuple(prompt), tuple(recording.token_ids))

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


class Load:
    """A number of streams at any time: each that ends is checked and followed by another, until `stop`."""

    def __init__(
        self,
        sources: Sequence[Source],
        cases: Sequence[Case],
        tokenizer: Tokenizer,
        *,
        streams: int,
        tokens: tuple[int, int],
        seed: int = 0,
        slo: Slo = CLASS_OBJECTIVE,
    ) -> None:
        """Prepare; use it as an async context manager.

        Args:
            sources: take the streams in turn.
            tokens: shortest and longest completion asked for.
            slo: objective of the requests.
        """
        self.recordings: list[Recording] = []
        """Of the streams that ended as they should."""
        self.failures: list[str] = []
        self._sources = sources
        self._cases = cases
        self._tokenizer = tokenizer
        self._streams = streams
        self._tokens = tokens
        self._rng = random.Random(seed)
        self._slo = slo
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._repeat(number)) for number in range(self._streams)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Begin no more streams, and return when those under way have ended."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def further(self, count: int) -> None:
        """Wait until that many more streams have ended as they should."""
        enough = len(self.recordings) + count
        await until(lambda: len(self.recordings) >= enough, f"{count} further streams")

    async def _repeat(self, number: int) -> None:
        source = self._sources[number % len(self._sources)]
        while not self._stopping:
            case = self._rng.choice(self._cases)
            count = self._rng.randint(*self._tokens)
            recording = Recording()
            try:
                await recording.follow(source.stream(**case.options(count), slo=self._slo))
                recording.check(case.expected[:count], self._tokenizer)
            except Exception as error:
                got = len(recording.token_ids)
                self.failures.append(f"{type(error).__name__} after {got} of {count} tokens: {error}")
                await asyncio.sleep(0.2)
            else:
                self.recordings.append(recording)


def by_worker(recordings: Iterable[Recording]) -> Mapping[str, int]:
    """Count streams by the worker that ended them."""
    counts: dict[str, int] = {}
    for recording in recordings:
        counts[recording.workers[-1]] = counts.get(recording.workers[-1], 0) + 1
    return counts
