"""Our scheduler over vLLM's own, without a model: only what it schedules is computed, by nobody."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest

from services.common.config import resolve
from services.worker.config import WorkerConfig

pytestmark = pytest.mark.engine

MAX_SEQS = 8
_NUMBERS = count(1)


def make_scheduler(scratch: Path, *, asynchronous: bool) -> Any:
    """Return a scheduler that can read KV from another worker."""
    import torch
    from vllm.config import KVTransferConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from services.worker.engine import adapter
    from services.worker.engine.core.scheduler import AsyncPolicyScheduler, SyncPolicyScheduler
    from services.worker.engine.kv_transfer import connector_config, provide_nixl
    from services.worker.engine.settings import KvTransferSettings

    flags = {"engine": "emulated", "max_model_len": "8192", "max_num_batched_tokens": "512", "vocab_size": "1000"}
    settings = resolve(WorkerConfig, flags={**flags, "max_num_seqs": str(MAX_SEQS)}).engine_settings()
    config = adapter._engine_config(settings, scratch)
    provide_nixl()
    config.scheduler_config.async_scheduling = asynchronous
    config.cache_config.num_gpu_blocks = 4000
    config.kv_transfer_config = KVTransferConfig(
        **connector_config(KvTransferSettings(host="127.0.0.1", lease_s=30), "cpu", 5600)
    )
    config.kv_transfer_config.engine_id = "here"
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float16)
    return (AsyncPolicyScheduler if asynchronous else SyncPolicyScheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=4000, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
        log_stats=False,
    )


def make_request(
    tokens: int, *, ttft_s: float = 3600.0, kv: dict[str, Any] | None = None, regex: str | None = None, **standing: Any
) -> Any:
    """Return a request as the front end hands it over; `kv` says where its KV is read from."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    number = next(_NUMBERS)
    name = f"r{number}"
    ours = {"request_id": name, "name": name, "arrival_s": time.monotonic(), "ttft_slo_s": ttft_s, "tbt_slo_s": 10.0}
    extra = {"ascendra": ours | standing} | ({"kv_transfer_params": kv} if kv else {})
    return Request(
        request_id=name,
        prompt_token_ids=[(number * 7919 + place) % 997 for place in range(tokens)],
        sampling_params=SamplingParams(
            max_tokens=500,
            ignore_eos=True,
            temperature=0.0,
            extra_args=extra,
            structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
        ),
        pooling_params=None,
        block_hasher=get_request_block_hasher(16, sha256),
    )


def make_moved() -> Any:
    """Return a running stream that comes here with its KV."""
    where: dict[str, Any] = {"remote_block_ids": [list(range(1, 9))], "remote_request_id": "x"}
    where |= {"do_remote_prefill": True, "do_remote_decode": False}
    where |= {"remote_engine_id": "there", "remote_host": "127.0.0.1", "remote_port": 1, "tp_size": 1}
    return make_request(128, kv=where, generated_tokens=5, last_token_s=time.monotonic())


def step(scheduler: Any, *, read: tuple[str, ...] = ()) -> Any:
    """Schedule a step and hand in its tokens, with the requests whose KV was read meanwhile."""
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    output = scheduler.schedule()
    ids = list(output.num_scheduled_tokens)
    scheduler.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: place for place, request_id in enumerate(ids)},
            sampled_token_ids=[[] if scheduler.requests[one].is_prefill_chunk else [5] for one in ids],
            kv_connector_output=KVConnectorOutput(finished_recving=set(read)) if read else None,
        ),
    )
    return output


def in_a_process(run: Callable[..., None], *arguments: object) -> None:
    """Run something by itself: NIXL aborts a process that has loaded other libraries' copies of what it brings."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(run, *arguments).result(120)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_whoever_reads_its_kv_has_its_place_while_others_pause(asynchronous: bool, tmp_path: Path) -> None:
    """It starts by itself once its KV is there: the paused prefill, which comes back, still finds a place too."""
    in_a_process(moved_beside_a_paused_prefill, asynchronous, tmp_path)


def moved_beside_a_paused_prefill(asynchronous: bool, scratch: Path) -> None:
    """Let a request read its KV while a long prompt is paused for short ones that take every slot."""
    scheduler = make_scheduler(scratch, asynchronous=asynchronous)
    for _ in range(5):
        scheduler.add_request(make_request(20))
    step(scheduler)
    moved = make_moved()
    scheduler.add_request(moved)
    scheduler.add_request(make_request(5000, ttft_s=60.0))
    step(scheduler, read=(moved.request_id,))
    for _ in range(2):
        scheduler.add_request(make_request(100, ttft_s=1.0))
    started = 0
    for _ in range(20):
        started += moved.request_id in step(scheduler).num_scheduled_tokens
        assert len(scheduler.running) <= MAX_SEQS
    assert started


def test_a_stream_that_moves_with_its_kv_does_not_wait_behind_prefills(tmp_path: Path) -> None:
    """A step to begin to read, and the first after it has read: however long the prompts there, slots free or not."""
    in_a_process(moved_behind_long_prefills, tmp_path)


def moved_behind_long_prefills(scratch: Path) -> None:
    """Move a stream to where long prompts are being prefilled."""
    for asynchronous, residents in product((False, True), (2, MAX_SEQS - 3)):
        own = scratch / f"{asynchronous}-{residents}"
        own.mkdir()
        _moved_behind(residents, make_scheduler(own, asynchronous=asynchronous))


def _moved_behind(residents: int, scheduler: Any) -> None:
    for _ in range(2):
        scheduler.add_request(make_request(20))
    step(scheduler)
    for _ in range(residents):
        scheduler.add_request(make_request(7500))
    step(scheduler)
    moved = make_moved()
    scheduler.add_request(moved)
    step(scheduler)
    assert moved.request_id not in {request.request_id for request in scheduler.waiting}, "it does not read its KV"
    step(scheduler, read=(moved.request_id,))
    prefilled = [step(scheduler).num_scheduled_tokens for _ in range(4)]
    assert moved.request_id in prefilled[0]
    # The prompts go on in the steps after it.
    assert all(sum(tokens.values()) > 400 for tokens in prefilled[1:])


def test_nobody_pauses_for_whom_waits_for_its_constraint(tmp_path: Path) -> None:
    """While it is compiled no step can take the request in: the prompt that is being prefilled goes on."""
    in_a_process(constrained_beside_a_long_prefill, tmp_path)


def constrained_beside_a_long_prefill(scratch: Path) -> None:
    """Queue a short prompt with a constraint that nobody compiles, then one without, behind a long prefill."""
    scheduler = make_scheduler(scratch, asynchronous=False)
    long = make_request(7500)
    scheduler.add_request(long)
    step(scheduler)
    scheduler.add_request(make_request(100, ttft_s=1.0, regex="a+"))
    assert [step(scheduler).num_scheduled_tokens for _ in range(4)] == [{long.request_id: 512}] * 4
    short = make_request(100, ttft_s=1.0)
    scheduler.add_request(short)
    assert step(scheduler).num_scheduled_tokens == {short.request_id: 100}


def test_a_step_waits_for_few_look_ups() -> None:
    """Many long prompts that share their beginning are not all looked up at once, but all of them in time."""
    from services.worker.engine.core.prefix_lookup import PrefixLookup

    lookup, walked = PrefixLookup(None), []

    def slow(request: Any) -> int:
        walked.append(request.request_id)
        time.sleep(0.0006)
        return 0

    lookup._look_up = slow  # type: ignore[method-assign]
    requests = [make_request(20) for _ in range(60)]
    for number in range(60):  # 1.8 s: those in front are due again before those behind were asked
        before = len(walked)
        for request in requests:
            lookup.computed_tokens(request, 100.0 + 0.03 * number)
        assert len(walked) - before <= 2
    assert set(walked) == {request.request_id for request in requests}
