"""Moved requests against the same requests unmoved, on real vLLM: token ids and text, by kind of sampling and of cut.

`python -m tests.cluster.exactness --out bench/results/moves-exactness.json` runs everything in float32, where moved
and unmoved must be equal, and in bfloat16, where it counts how often they are, beside a control: unmoved requests
against themselves among other requests. It exits with 1 if anything differed in float32.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ascendra.v1 import common_pb2, inference_pb2
from services.router.dispatcher import Dispatcher
from services.router.mailbox import Sink
from services.router.request import LiveRequest
from services.router.text import TextCodec
from tests.support.attach_client import encode_ids
from tests.support.load import random_prompts
from tests.support.local_router import LocalRouter, local_router
from tests.support.tiny_model import shared_tiny_model
from tests.support.worker_process import WorkerFleet, cpu_worker

MAX_TOKENS = 48
PROMPTS = 100
DTYPES = ("float32", "bfloat16")
AT_ONCE = 96
"""Requests in the engines at any time."""
_STOP_CHARACTERS = 4
_TRIES = 20
_CHARACTERS = "éあ😀"
ROUTER = {"offload": False, "rescue": False, "tickets": False, "model_name": "tiny"}
WORKER = {"max_num_seqs": 128, "max_num_batched_tokens": 512}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top-k, top-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "min-p, repetition penalty": {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
    "greedy, penalties": {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 1.0},
    "sampled, penalties": {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "min_tokens, stop tokens": {"temperature": 1.0, "min_tokens": 12, "stop_token_ids": range(2, 200, 3)},
    "characters of several tokens": {"temperature": 1.0},
}
"""Kinds of sampling; prompts take them in turn. All have a seed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A request: what is asked, and in which row of the table it counts."""

    name: str
    kind: str
    prompt: tuple[int, ...]
    sampling: common_pb2.SamplingParameters

    def message(self, request_id: str) -> inference_pb2.GenerateRequest:
        """Return the request, with objectives that no worker misses."""
        message = inference_pb2.GenerateRequest(request_id=request_id, sampling=self.sampling)
        message.tokens.token_ids = encode_ids(list(self.prompt))
        message.slo.ttft_ms, message.slo.tbt_ms = 600_000, 60_000
        return message


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """What a client received."""

    token_ids: tuple[int, ...]
    text: str
    reason: int
    cuts: tuple[int, ...]
    """Offsets at which it went on elsewhere."""


@dataclasses.dataclass(slots=True)
class Cell:
    """How often moved and unmoved were the same."""

    runs: int = 0
    same_tokens: int = 0
    same_text: int = 0


class Cutter:
    """Moves requests of a router in its own process the moment that they have so many tokens."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.cuts: dict[str, int] = {}
        self._dispatcher = dispatcher
        self._start = dispatcher.start
        dispatcher.start = self._start_and_cut  # type: ignore[method-assign]

    def _start_and_cut(self, request: LiveRequest) -> None:
        cut = self.cuts.get(request.spec.request_id)
        if cut:
            request.sink = _CuttingSink(request.sink, request, cut, self._dispatcher)
        self._start(request)
        if cut == 0:
            self._dispatcher.abandon(request, "cut by a test")


class _CuttingSink:
    def __init__(self, sink: Sink, request: LiveRequest, cut: int, dispatcher: Dispatcher) -> None:
        self._sink, self._request, self._cut, self._dispatcher = sink, request, cut, dispatcher
        self.accepted, self.finished = sink.accepted, sink.finished
        self.failed, self.abandoned = sink.failed, sink.abandoned

    def tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs] = ()
    ) -> bool:
        read = self._sink.tokens(offset, token_ids, text, logprobs)
        if offset + len(token_ids) == self._cut:
            self._dispatcher.abandon(self._request, "cut by a test")
        return read


def cases(codec: TextCodec, vocab_size: int, count: int, seed: int) -> list[Case]:
    """Return random prompts with each kind of sampling in turn."""
    pieces = [token for character in _CHARACTERS for token in _ids(codec, character)]
    made = []
    for number, prompt in enumerate(random_prompts(count, (4, 400), seed=seed, vocab_size=vocab_size)):
        kind = list(SAMPLING)[number % len(SAMPLING)]
        fields: dict[str, Any] = {"max_tokens": MAX_TOKENS, "seed": 1000 * seed + number, "ignore_eos": True}
        sampling = common_pb2.SamplingParameters(**fields | SAMPLING[kind])
        if kind == "characters of several tokens":
            sampling.allowed_token_ids.extend(sorted(set(pieces)))
        made.append(Case(f"{seed}-{number}", kind, prompt, sampling))
    return made


def cut_offsets(output: Output, texts: Sequence[str], rng: random.Random) -> dict[str, int]:
    """Return where to cut a request that gave this output unmoved, by kind of cut.

    Args:
        texts: text that each of its tokens completed.
    """
    count = len(output.token_ids)
    cuts = {"0": 0, "1": 1, "middle": count // 2, "anywhere": rng.randrange(2, count - 1), "last token": count - 1}
    inside = [
        offset
        for offset in range(1, count)
        if not texts[offset - 1] and (after := next(filter(None, texts[offset:]), "")) and after[0] != "\ufffd"
    ]
    if inside:
        cuts["in a character"] = rng.choice(inside)
    return cuts


def stop_within(output: Output, texts: Sequence[str], rng: random.Random) -> tuple[str, int] | None:
    """Return a stop string that ends this output late, and an offset with the stop string begun and not complete."""
    ends = [len("".join(texts[: count + 1])) for count in range(len(texts))]
    starts = list(range(len(output.text) // 3, len(output.text) - _STOP_CHARACTERS))
    rng.shuffle(starts)
    for start in starts:
        stop = output.text[start : start + _STOP_CHARACTERS]
        inside = [number + 1 for number, end in enumerate(ends) if start < end < start + _STOP_CHARACTERS]
        if inside and stop.isprintable() and "\ufffd" not in stop and output.text.index(stop) == start:
            return stop, rng.choice(inside)
    return None


class Comparison:
    """Runs requests unmoved and moved on the workers of one router."""

    def __init__(self, router: LocalRouter, seed: int) -> None:
        self._router = router
        self._codec = router.router.codec
        self._cutter = Cutter(router.router.dispatcher)
        self._rng = random.Random(seed)
        self._runs = 0
        self.table: dict[str, dict[str, Cell]] = defaultdict(lambda: defaultdict(Cell))
        self.differences: list[dict[str, Any]] = []

    async def run(self, asked: Sequence[Case], cuts_each: int = 0) -> None:
        """Cut each request at every kind of offset (or at `cuts_each` of them in turn) and fill the table."""
        unmoved = await self.outputs([(case, None) for case in asked])
        moved: list[tuple[Case, int]] = []
        kinds: list[str] = []
        expected: list[Output] = []
        stopping: list[tuple[Case, int]] = []
        for number, (case, output) in enumerate(zip(asked, unmoved, strict=True)):
            texts = self._texts(output.token_ids)
            cuts = list(cut_offsets(output, texts, self._rng).items())
            first = number * cuts_each % len(cuts)
            chosen = (cuts + cuts)[first : first + cuts_each] if cuts_each else cuts
            for kind, cut in chosen:
                moved.append((case, cut))
                kinds.append(kind)
                expected.append(output)
            found = stop_within(output, texts, self._rng)
            if found is not None:
                sampling = common_pb2.SamplingParameters()
                sampling.CopyFrom(case.sampling)
                sampling.stop.append(found[0].encode())
                stopping.append((dataclasses.replace(case, sampling=sampling), found[1]))
        moved += stopping
        kinds += ["in a stop string"] * len(stopping)
        expected += await self.outputs([(case, None) for case, _ in stopping])
        outputs = await self.outputs(moved)
        for (case, cut), kind, before, after in zip(moved, kinds, expected, outputs, strict=True):
            assert after.cuts == (cut,), f"{case.name} was cut at {after.cuts} instead of {cut}"
            self._count(case, kind, before, after, cut)

    async def control(self, asked: Sequence[Case], at_once: int) -> list[dict[str, int]]:
        """Return in what unmoved requests differ between two runs: one in a full batch, one among other requests."""
        full = await self.outputs([(case, None) for case in asked])
        mixed = [(case, None) for case in asked]
        self._rng.shuffle(mixed)
        outputs = await self.outputs(mixed, at_once)
        again = {case.name: output for (case, _), output in zip(mixed, outputs, strict=True)}
        return [
            {"first_difference": _first_difference(output, again[case.name])}
            for case, output in zip(asked, full, strict=True)
            if output.token_ids != again[case.name].token_ids
        ]

    async def outputs(self, asked: Sequence[tuple[Case, int | None]], at_once: int = AT_ONCE) -> list[Output]:
        """Run requests, each cut at an offset or at none."""
        slots = asyncio.Semaphore(at_once)

        async def one(case: Case, cut: int | None) -> Output:
            async with slots:
                output = await self._output(case, cut)
                for _ in range(_TRIES):
                    if cut is None or output.cuts:
                        break
                    # A busy worker sends two tokens at once now and then: the offset between them was not seen.
                    output = await self._output(case, cut)
                return output

        return await asyncio.gather(*(one(case, cut) for case, cut in asked))

    async def _output(self, case: Case, cut: int | None) -> Output:
        self._runs += 1
        request_id = f"{case.name}-{self._runs}"
        if cut is not None:
            self._cutter.cuts[request_id] = cut
        done = await self._router.collect(case.message(request_id))
        cuts = tuple(attempt.first_token_offset for attempt in done.finished.receipt.attempts[1:])
        return Output(tuple(done.token_ids), done.text, done.finished.reason, cuts)

    def _texts(self, token_ids: Iterable[int]) -> list[str]:
        return list(map(self._codec.decoder().step, token_ids))

    def _count(self, case: Case, kind: str, before: Output, after: Output, cut: int) -> None:
        cell = self.table[case.kind][kind]
        cell.runs += 1
        cell.same_tokens += after.token_ids == before.token_ids and after.reason == before.reason
        cell.same_text += after.text == before.text
        if after.token_ids != before.token_ids or after.text != before.text or after.reason != before.reason:
            first = _first_difference(before, after)
            self.differences.append(
                {"request": case.name, "sampling": case.kind, "cut": cut, "kind": kind, "first_difference": first}
            )

    def cells(self) -> list[Cell]:
        """Return all cells."""
        return [cell for row in self.table.values() for cell in row.values()]

    def numbers(self) -> dict[str, Any]:
        """Return the table and its sums as plain data."""
        cells = self.cells()
        return {
            "runs": sum(cell.runs for cell in cells),
            "same_tokens": sum(cell.same_tokens for cell in cells),
            "same_text": sum(cell.same_text for cell in cells),
            "table": {
                kind: {cut: dataclasses.asdict(cell) for cut, cell in row.items()} for kind, row in self.table.items()
            },
            "median_tokens_from_cut_to_difference": _median(
                entry["first_difference"] - entry["cut"] for entry in self.differences
            ),
        }


def _ids(codec: TextCodec, text: str) -> list[int]:
    encoded: list[int] = codec._tokenizer.encode(text, add_special_tokens=False).ids
    return encoded


def _first_difference(one: Output, other: Output) -> int:
    """Return the offset of the first token that differs."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    same = next((offset for offset, (a, b) in enumerate(pairs) if a != b), None)
    return min(len(one.token_ids), len(other.token_ids)) if same is None else same


def _median(values: Iterable[float]) -> float | None:
    listed = list(values)
    return statistics.median(listed) if listed else None


async def _measure(model: Path, fleet: WorkerFleet, dtype: str, prompts: int, seed: int) -> dict[str, Any]:
    addresses = [fleet.address(f"{dtype}-{number}") for number in range(2)]
    async with local_router(model, addresses, **ROUTER) as router:
        await router.attached(2)
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        asked = cases(router.router.codec, vocab_size, prompts, seed)
        comparison = Comparison(router, seed)
        await comparison.run(asked)
        changed = await comparison.control(asked, at_once=8)
    control = {
        "runs": len(asked),
        "same_tokens": len(asked) - len(changed),
        "median_first_difference": _median(entry["first_difference"] for entry in changed),
    }
    return {"moved": comparison.numbers(), "unmoved_in_other_company": control}


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.exactness", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--model", type=Path, help="model directory; left out: a tiny random Llama")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = options.model or shared_tiny_model()
    result: dict[str, Any] = {
        "model": model.name,
        "prompts": options.prompts,
        "max_tokens": MAX_TOKENS,
        "seed": options.seed,
    }
    workers = {f"{dtype}-{number}": cpu_worker(model, dtype=dtype, **WORKER) for dtype in DTYPES for number in range(2)}
    with tempfile.TemporaryDirectory(prefix="ascendra-") as folder, WorkerFleet(Path(folder), workers) as fleet:
        for dtype in DTYPES:
            result[dtype] = asyncio.run(_measure(model, fleet, dtype, options.prompts, options.seed))
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    moved = result["float32"]["moved"]
    return 0 if moved["runs"] == moved["same_tokens"] == moved["same_text"] else 1


if __name__ == "__main__":
    sys.exit(main())
