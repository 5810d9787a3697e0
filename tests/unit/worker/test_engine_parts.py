"""Parts of the engine core that need vLLM's modules but no engine."""

import asyncio
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from services.common.config import resolve
from services.worker.config import WorkerConfig
from services.worker.engine.contract import EngineDead
from services.worker.engine.core.compatibility import kv_transfer_mismatches, scheduler_mismatches

pytestmark = pytest.mark.engine


class OldScheduler:
    """A scheduler whose interface is another."""

    def __init__(self) -> None:
        self.waiting = self.running = self.requests = None

    def schedule(self, throttle: bool) -> None:
        """Require what ours does not pass."""

    def update_from_output(self, model_runner_output: object) -> None:
        """Lack a parameter."""

    def add_request(self, request: object) -> None:
        """Fit."""


def test_the_installed_scheduler_is_the_one_we_extend() -> None:
    """vLLM's scheduler has the methods, parameters and attributes that our mixin relies on."""
    assert scheduler_mismatches() == []


def test_the_nixl_connector_is_the_one_that_exports_were_written_for() -> None:
    """The installed vLLM has what an export touches."""
    assert kv_transfer_mismatches() == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (1, 1, "uni")),
        ({"tensor_parallel_size": "2"}, (2, 1, "mp")),
        ({"pipeline_parallel_size": "2", "token_budget": "static", "executor": "mp"}, (1, 2, "mp")),
    ],
    ids=["one", "tensor", "pipeline"],
)
def test_parallel_sizes_reach_the_engine(
    flags: dict[str, str],
    expected: tuple[int, int, str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """What splits the model is in vLLM's own configuration, which vLLM accepts, beside our scheduler."""
    from services.worker.engine import adapter
    from services.worker.engine.environment import prepare_environment

    base = {"engine": "cpu", "model": str(tiny_model), "max_model_len": "256", "dtype": "float32", "kv_transfer": "off"}
    settings = resolve(WorkerConfig, flags={**base, **flags}).engine_settings()
    with patch.dict(os.environ):
        prepare_environment("cpu", 1)
        config = adapter._engine_config(settings, tmp_path)
    parallel = config.parallel_config
    found = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.distributed_executor_backend)
    assert found == expected
    assert config.scheduler_config.scheduler_cls == adapter._SCHEDULER


def test_the_front_end_has_what_the_adapter_uses() -> None:
    """Every argument that the adapter passes to vLLM exists in the installed version."""
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient

    def missing(callable_: Callable[..., Any], *names: str) -> set[str]:
        return set(names) - set(inspect.signature(callable_).parameters)

    assert inspect.signature(envs.enable_envs_cache).parameters == {}
    assert not missing(AsyncLLM.generate, "prompt", "sampling_params", "request_id", "priority")
    assert not missing(AsyncLLM.from_vllm_config, "vllm_config", "stat_loggers", "disable_log_stats")
    assert not missing(AsyncMPClient.call_utility_async, "method", "args")
    assert not missing(StructuredOutputsParams, "json", "regex", "grammar")
    assert not missing(
        AsyncEngineArgs,
        *("model", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "seed", "dtype", "scheduling_policy"),
        *("enable_prefix_caching", "tensor_parallel_size", "skip_tokenizer_init", "additional_config", "block_size"),
        *("kv_cache_memory_bytes", "enforce_eager", "logits_processors", "distributed_executor_backend"),
        "scheduler_cls",
    )
    assert not missing(
        SamplingParams,
        *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias", "bad_words"),
        *("allowed_token_ids", "structured_outputs", "detokenize", "output_kind", "extra_args"),
    )
    assert isinstance(AsyncLLM.errored, property)


def test_another_scheduler_is_recognised() -> None:
    """Every difference is named, so that the worker can fall back to stock priorities and say why."""
    found = "\n".join(scheduler_mismatches(OldScheduler))
    for name in (
        "schedule requires ['throttle']",
        "update_from_output takes",
        "finish_requests is missing",
        "max_num_scheduled_tokens",
    ):
        assert name in found


def test_emulated_tokens_are_a_function_of_the_history() -> None:
    """Extending a history token by token and starting from the extended one give the same next tokens."""
    from services.worker.engine.core.emulated import FIRST_ORDINARY_TOKEN, TokenHistory

    history = TokenHistory([5, 6, 7])
    generated = [history.next_token(1000) for _ in range(50)]
    for cut in (1, 17, 49):
        resumed = TokenHistory([5, 6, 7, *generated[:cut]])
        assert [resumed.next_token(1000) for _ in range(50 - cut)] == generated[cut:]
    assert TokenHistory([5, 7, 6]).next_token(1000) != TokenHistory([5, 6, 7]).next_token(1000)
    assert all(FIRST_ORDINARY_TOKEN <= token < 1000 for token in generated)
    assert len(set(generated)) > 40


def test_emulated_steps_make_up_for_lost_time() -> None:
    """Steps back to back end on time although waking up and scheduling take time; a new burst starts afresh."""
    from services.worker.engine.core.emulated import StepClock

    clock = StepClock()
    assert clock.sleep_for(0.010, 100.0, continues=False) == pytest.approx(0.010)
    assert clock.sleep_for(0.010, 100.013, continues=True) == pytest.approx(0.007)
    assert clock.sleep_for(0.010, 100.022, continues=True) == pytest.approx(0.008)
    assert clock.sleep_for(0.010, 101.000, continues=False) == pytest.approx(0.010)
    assert clock.sleep_for(0.010, 102.000, continues=True) == 0.0


def test_noise_is_keyed_by_seed_and_position() -> None:
    """Neighbouring seeds and positions give unrelated generator seeds within torch's range."""
    from services.worker.engine.core.sampling import noise_seed

    seeds = {noise_seed(seed, position) for seed in range(50) for position in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(2**63 - 1, 10) == noise_seed(2**63 - 1, 10)


def test_what_is_computed_is_not_looked_up() -> None:
    """A request whose KV came from elsewhere waits with it; the prefix cache has no say."""
    from services.worker.engine.core.prefix_lookup import PrefixLookup

    arrived: Any = SimpleNamespace(num_computed_tokens=700)
    assert PrefixLookup(None).computed_tokens(arrived, 0.0) == 700


async def test_an_answer_that_came_while_the_process_was_held_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit of a control call runs out in the same moment in which its answer is read: the engine is well."""
    from services.worker.engine import adapter

    monkeypatch.setattr(adapter, "_CONTROL_TIMEOUT_S", 0.05)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    async def call(*_: Any) -> str:
        return await answer

    llm: Any = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call))
    loop.call_later(0.2, answer.set_result, "late")
    waiting = asyncio.create_task(adapter._control(llm, "release", []))
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - what holds the process up
    assert await waiting == "late"
    monkeypatch.setattr(adapter, "_UNREAD_S", 0.05)
    answer = loop.create_future()
    with pytest.raises(EngineDead):
        await adapter._control(llm, "release", [])
