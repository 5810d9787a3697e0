"""Log-probabilities of tokens that share a message."""

from pathlib import Path

from ascendra.v1 import common_pb2, worker_pb2
from tests.support.local_router import cluster, text_request, until
from tests.support.scripted_worker import ScriptedWorker


def position(token_id: int) -> common_pb2.PositionLogprobs:
    """Return log-probabilities that name their token."""
    return common_pb2.PositionLogprobs(sampled=common_pb2.TokenLogprob(token_id=token_id, logprob=-1.0, rank=1))


async def test_each_token_keeps_its_own(tokenizer_directory: Path) -> None:
    """A worker that is behind puts several steps of one request into a message; none takes the place of another."""
    worker = ScriptedWorker()
    worker.freeze_steps = True
    async with cluster(tokenizer_directory, worker) as router:
        call = router.inference.Generate(text_request(max_tokens=3))
        await until(lambda: bool(worker.submitted))
        handle = worker.submitted[0].handle
        worker.send_step(
            handles=[handle, handle],
            token_counts=[1, 2],
            token_ids=[66, 67, 68],
            logprobs=[
                worker_pb2.HandleLogprobs(handle=handle, positions=[position(66)]),
                worker_pb2.HandleLogprobs(handle=handle, positions=[position(67), position(68)]),
            ],
            ended=[worker_pb2.RequestEnded(handle=handle, reason=common_pb2.FINISH_REASON_LENGTH)],
        )
        named = [one.sampled.token_id async for response in call for one in response.logprobs]
    assert named == [66, 67, 68]
