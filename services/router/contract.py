"""What a move of a request after its first token preserves: decided from its sampling and from what workers keep."""

from collections.abc import Iterable

from ascendra.v1 import common_pb2, worker_pb2


def move_contract(
    sampling: common_pb2.SamplingParameters, workers: Iterable[worker_pb2.Welcome]
) -> "tuple[common_pb2.MoveContract, str]":
    """Return the contract of a request that may run on any of these workers, and why it is not exact."""
    if sampling.HasField("structured_output"):
        return common_pb2.MOVE_CONTRACT_PINNED, "guided decoding keeps its state in the engine"
    if sampling.bad_words:
        return common_pb2.MOVE_CONTRACT_PINNED, "bad_words are matched against what the engine generated itself"
    known = False
    for worker in workers:
        known = True
        if why := _inexact(sampling, worker):
            return common_pb2.MOVE_CONTRACT_CONTINUOUS, why
    if not known:
        return common_pb2.MOVE_CONTRACT_CONTINUOUS, "no worker is attached that says what it keeps"
    return common_pb2.MOVE_CONTRACT_EXACT, ""


def _inexact(sampling: common_pb2.SamplingParameters, worker: worker_pb2.Welcome) -> str:
    """Return what a continuation on this worker may change; empty: nothing."""
    if not worker.HasField("continuation"):
        return f"worker {worker.worker_id} does not say what it keeps"
    keeps = worker.continuation
    if (sampling.presence_penalty or sampling.frequency_penalty) and not keeps.carried_penalties:
        return f"penalties count the tokens of one worker only on {worker.worker_id}"
    random = not sampling.HasField("temperature") or sampling.temperature > 0
    if random and not keeps.keyed_noise:
        return f"the noise of sampled tokens starts anew on {worker.worker_id}"
    if keeps.dtype != "float32":
        return f"{worker.worker_id} computes in {keeps.dtype}, where logits depend on the batch"
    return ""
