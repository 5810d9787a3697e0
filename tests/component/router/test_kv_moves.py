"""Moves of running requests: who is asked for the KV cache, who is told to free it, and what if that fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ascendra.v1 import cluster_pb2, worker_pb2
from services.policy.kv_move import KvMovePolicy
from services.router.request import LiveRequest
from services.router.worker_link import WorkerLink
from tests.support.local_router import Collected, LocalRouter, cluster, text_request, until
from tests.support.scripted_worker import ScriptedWorker

EXPECTED = [66 + i % 26 for i in range(2000)]
TOKENS = 300
CHEAP = KvMovePolicy(latency_s=1e-6, bytes_per_s=1e12, bound_s=0.3)


def worker(worker_id: str, compatibility: str = "same") -> ScriptedWorker:
    """Return a worker that hands KV over."""
    transfer = worker_pb2.KvTransfer(compatibility=compatibility, bytes_per_token=1, lease_ms=10_000)
    made = ScriptedWorker(worker_id, kv_transfer=transfer)
    made.step_s = 0.005
    return made


@dataclass
class Running:
    """A request in mid-stream, and the workers that it is and is not on."""

    router: LocalRouter
    request: LiveRequest
    source: ScriptedWorker
    target: ScriptedWorker
    done: "asyncio.Task[Collected]"

    def link(self, of: ScriptedWorker) -> WorkerLink:
        """Return the router's link to a worker."""
        return next(link for link in self.router.router.pool.links() if link.worker_id == of.welcome.worker_id)

    def move(self) -> bool:
        """Move it to the other worker."""
        return self.router.router.mover.move(self.request, "the test wants it", self.link(self.target))

    def kinds(self) -> list[str]:
        """Return the kinds of decisions about it."""
        return [record.kind for record in self.request.decisions]

    async def finished(self) -> list[tuple[str, str]]:
        """Check the stream's tokens and return (worker, moved by) of its attempts."""
        collected = await self.done
        assert collected.token_ids == EXPECTED[:TOKENS]
        return [(one.worker_id, one.moved_by) for one in collected.finished.receipt.attempts]


@asynccontextmanager
async def running(directory: Path, one: ScriptedWorker, two: ScriptedWorker, **keys: Any) -> AsyncIterator[Running]:
    """Have one request in mid-stream on either of two workers."""
    async with cluster(directory, one, two, **{"kv_move_policy": CHEAP, **keys}) as router:
        done = asyncio.create_task(router.collect(text_request(max_tokens=TOKENS)))
        live = router.router.dispatcher.live
        await until(lambda: any(len(request.generated) >= 5 for request in live.values()))
        source, target = (one, two) if one.submitted else (two, one)
        yield Running(router, next(iter(live.values())), source, target, done)
        assert not router.router.mover.busy


async def test_a_stream_moves_with_its_kv_cache(tokenizer_directory: Path) -> None:
    """The target gets the handle and every token so far; the source is told to free once the target has it."""
    async with running(tokenizer_directory, worker("a"), worker("b")) as moving:
        assert moving.move()
        assert not moving.move()  # it is on its way
        attempts = await moving.finished()
    source, target = moving.source, moving.target
    assert attempts == [(source.welcome.worker_id, ""), (target.welcome.worker_id, "kv")]
    [submit] = target.submitted
    [handle] = source.exported
    assert submit.kv_handle == f"kv of {handle}".encode()
    assert len(submit.token_ids) // 4 == moving.request.spec.prompt_tokens + submit.generated_tokens
    assert submit.generated_tokens >= 5
    assert source.released == [handle]
    assert source.cancelled == []
    assert "by kv: transfer" in moving.request.decisions[-1].rule


async def test_a_failed_read_is_computed_where_it_is(tokenizer_directory: Path) -> None:
    """What the target cannot read it computes: the receipt says so, and the source frees."""
    one, two = worker("a"), worker("b")
    one.kv_read = two.kv_read = "failed"
    async with running(tokenizer_directory, one, two) as moving:
        assert moving.move()
        await until(lambda: len(moving.target.submitted) > 0 and moving.source.released == moving.source.exported)
        attempts = await moving.finished()
    assert attempts[1:] == [(moving.target.welcome.worker_id, "replay")]
    assert "kv_failed" in moving.kinds()


async def test_a_read_that_takes_too_long_is_replayed(tokenizer_directory: Path) -> None:
    """The target aborts, and only when it has said so the source frees; the request is computed again."""
    one, two = worker("a"), worker("b")
    one.kv_read = two.kv_read = "stuck"
    one.ignore_cancel = two.ignore_cancel = True
    async with running(tokenizer_directory, one, two, cancel_timeout_s=30.0) as moving:
        assert moving.move()
        attempts = await moving.finished()
        stuck, replayed = moving.target.submitted
        assert (bool(stuck.kv_handle), bool(replayed.kv_handle)) == (True, False)
        assert moving.source.released == []
        cancelled = worker_pb2.Cancelled(handles=[stuck.handle])
        moving.target.send(worker_pb2.AttachResponse(cancelled=cancelled))
        await until(lambda: moving.source.released == moving.source.exported)
    assert [method for _, method in attempts] == ["", "kv", "replay"]


async def test_a_source_that_does_not_answer_is_left_by_replay(tokenizer_directory: Path) -> None:
    """Without an answer in time the attempt is aborted; an answer that comes later is freed at once."""
    one, two = worker("a"), worker("b")
    one.ignore_export = two.ignore_export = True
    async with running(tokenizer_directory, one, two) as moving:
        assert moving.move()
        attempts = await moving.finished()
        asked = next(m.export_kv for m in moving.source.received if m.WhichOneof("message") == "export_kv")
        late = worker_pb2.KvExported(export_id=asked.export_id, handle=asked.handle, kv_handle=b"late")
        moving.source.send(worker_pb2.AttachResponse(kv_exported=late))
        await until(lambda: moving.source.released == [asked.handle])
    assert [method for _, method in attempts] == ["", "replay"]
    assert moving.source.cancelled == [asked.handle]


async def test_a_refused_move_changes_nothing(tokenizer_directory: Path) -> None:
    """A request that its worker keeps goes on there; it may be asked for again."""
    one, two = worker("a"), worker("b")
    one.refuse_export = two.refuse_export = "it does not decode"
    async with running(tokenizer_directory, one, two) as moving:
        assert moving.move()
        await until(lambda: "move_refused" in moving.kinds())
        assert moving.router.router.mover.plan(moving.request) is not None
        attempts = await moving.finished()
    assert len(attempts) == 1
    assert not moving.target.submitted


async def test_the_death_of_the_source_does_not_stop_a_move(tokenizer_directory: Path) -> None:
    """Before it answered, the request is replayed elsewhere; afterwards, the target goes on."""
    one, two = worker("a"), worker("b")
    one.ignore_export = two.ignore_export = True
    async with running(tokenizer_directory, one, two) as moving:
        assert moving.move()
        await until(lambda: any(m.WhichOneof("message") == "export_kv" for m in moving.source.received))
        moving.source.drop_stream()
        attempts = await moving.finished()
    assert [method for _, method in attempts] == ["", "replay"]


async def test_the_death_of_the_target_leaves_the_source_to_its_lease(tokenizer_directory: Path) -> None:
    """A target that is lost may read on: the source is not told to free what it reads."""
    one, two = worker("a"), worker("b")
    one.kv_read = two.kv_read = "stuck"
    async with running(tokenizer_directory, one, two) as moving:
        assert moving.move()
        await until(lambda: len(moving.target.submitted) > 0)
        moving.target.drop_stream()
        attempts = await moving.finished()
    assert [method for _, method in attempts] == ["", "kv", "replay"]
    assert moving.source.released == []


async def test_a_client_that_leaves_in_mid_move(tokenizer_directory: Path) -> None:
    """Whichever worker has the request aborts it, and the source frees its KV cache."""
    one, two = worker("a"), worker("b")
    one.kv_read = two.kv_read = "stuck"
    async with running(tokenizer_directory, one, two) as moving:
        assert moving.move()
        await until(lambda: len(moving.target.submitted) > 0)
        moving.done.cancel()
        await until(lambda: moving.source.released == moving.source.exported)
    assert moving.target.cancelled == [moving.target.submitted[0].handle]


async def test_a_draining_worker_gives_its_streams_away(tokenizer_directory: Path) -> None:
    """At once, and with their KV caches; where that is not possible they stay to their end."""
    async with running(tokenizer_directory, worker("a"), worker("b")) as moving:
        drain = cluster_pb2.DrainWorkerRequest(worker_id=moving.source.welcome.worker_id)
        await moving.router.cluster.DrainWorker(drain)
        attempts = await moving.finished()
    assert [method for _, method in attempts] == ["", "kv"]
    assert "its worker drains; by kv" in moving.request.decisions[-1].rule
    async with running(tokenizer_directory, worker("a"), worker("b", "other")) as moving:
        drain = cluster_pb2.DrainWorkerRequest(worker_id=moving.source.welcome.worker_id)
        await moving.router.cluster.DrainWorker(drain)
        assert len(await moving.finished()) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda moving: moving.link(moving.target).known.ClearField("kv_transfer"), "hands no KV over"),
        (lambda moving: setattr(moving.link(moving.target).known.kv_transfer, "compatibility", "x"), "differ"),
    ],
    ids=["off", "incompatible"],
)
async def test_what_cannot_be_read_is_replayed(
    tokenizer_directory: Path, change: Callable[[Running], None], why: str
) -> None:
    """The receipt says that the tokens were computed again, and why."""
    async with running(tokenizer_directory, worker("a"), worker("b")) as moving:
        change(moving)
        assert moving.move()
        attempts = await moving.finished()
    assert [method for _, method in attempts] == ["", "replay"]
    assert why in moving.request.decisions[-1].rule
    assert not moving.source.exported
