"""An executor without a model: each step sleeps for what the step-time model says and returns deterministic tokens.

Everything above it is real vLLM: the front end, the engine core, the scheduler and the KV manager.
"""

import math
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

from services.policy.step_time import StepShape, StepTimeModel
from services.worker.engine.core.process import isolate_engine_core

FIRST_ORDINARY_TOKEN = 3
"""Smaller ids are special (begin, end of sequence, ...) and never generated."""
_CATCH_UP_S = 0.02
"""A step that woke up this much late is made up for in the next ones; what is later than that is lost."""
_MASK_64 = (1 << 64) - 1
_POWER_BASE = 0x9E3779B97F4A7C15 | 1


class TokenHistory:
    """The tokens of a request, as a hash that can be extended: the next token is a function of all before it."""

    def __init__(self, token_ids: list[int]) -> None:
        ids = np.asarray(token_ids, dtype=np.uint64) + np.uint64(1)
        self.length = len(token_ids)
        self._hash = int((ids * _powers(self.length)).sum(dtype=np.uint64))
        self._power = pow(_POWER_BASE, self.length, 1 << 64)

    def next_token(self, vocab_size: int) -> int:
        """Return the next token and add it to the history."""
        mixed = (self._hash + self.length * 0xD1B54A32D192ED03) & _MASK_64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
        token = FIRST_ORDINARY_TOKEN + (mixed ^ (mixed >> 31)) % (vocab_size - FIRST_ORDINARY_TOKEN)
        self._hash = (self._hash + (token + 1) * self._power) & _MASK_64
        self._power = self._power * _POWER_BASE & _MASK_64
        self.length += 1
        return token


def _powers(count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return base**0 .. base**(count-1) modulo 2**64."""
    factors = np.full(count, _POWER_BASE, dtype=np.uint64)
    if count:
        factors[0] = 1
    return np.multiply.accumulate(factors, dtype=np.uint64)


class StepClock:
    """Says how long to sleep so that steps back to back take exactly their times, whatever happens between them."""

    def __init__(self) -> None:
        self._due_s = -math.inf

    def sleep_for(self, step_s: float, now_s: float, *, continues: bool) -> float:
        """Return the seconds to sleep from now for a step of step_s.

        Args:
            continues: the engine was busy since the previous step, so this one starts where that one was due to end.
        """
        start_s = max(self._due_s, now_s - _CATCH_UP_S) if continues else now_s
        self._due_s = min(start_s, now_s) + step_s
        return max(self._due_s - now_s, 0.0)


class EmulatedExecutor(Executor):
    """Stands in for a GPU; configured by additional_config["ascendra"]["emulation"]."""

    uses_ray = False

    def _init_executor(self) -> None:
        isolate_engine_core()  # under vLLM's own scheduler nothing else of ours runs here
        settings = self.vllm_config.additional_config["ascendra"]["emulation"]
        self._model = StepTimeModel.from_dict(settings["step_time_model"])
        self._kv_capacity_tokens = int(settings["kv_capacity_tokens"])
        self._sigma = float(settings["jitter_sigma"])
        self._random = random.Random(int(settings["seed"]))
        self._vocab_size = self.model_config.get_vocab_size()
        self._clock = StepClock()
        self._histories: dict[str, TokenHistory] = {}

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Answer what the engine core asks of its workers at start-up; ignore what only a model needs."""
        block = self._spec()
        answers: dict[str, Any] = {
            "get_kv_cache_spec": {"emulated.attention": block},
            "determine_available_memory": self._kv_capacity_tokens // block.block_size * block.page_size_bytes,
            "get_supported_kv_cache_layouts": ["NHD"],
            "get_supported_tasks": ("generate",),
        }
        if isinstance(method, str) and method == "compile_or_warm_up_model":
            return []
        return [answers.get(method) if isinstance(method, str) else None]

    def check_health(self) -> None:
        """An emulated device never fails."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Sleep for the step and return one token for each request whose prefill is complete."""
        output = self._step(scheduler_output)
        if not non_block:
            return output
        future: Future[Any] = Future()
        future.set_result(output)
        return future

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Never asked for: execute_model returns the tokens."""
        raise AssertionError("the emulated executor samples in execute_model")

    def _spec(self) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=self.cache_config.block_size or 16, num_kv_heads=1, head_size=1, dtype=torch.float16
        )

    def _step(self, scheduled: Any) -> ModelRunnerOutput:
        for request_id in scheduled.finished_req_ids:
            self._histories.pop(request_id, None)
        computed = self._computed_before(scheduled)
        prefill = decodes = context = products = 0
        request_ids: list[str] = []
        sampled: list[list[int]] = []
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            history, before = self._histories[request_id], computed[request_id]
            complete = before + tokens >= history.length
            if tokens == 1 and complete and before > 0:
                decodes += 1
                context += before
            else:
                prefill += tokens
                products += tokens * before
            request_ids.append(request_id)
            sampled.append([history.next_token(self._vocab_size)] if complete else [])
        if request_ids:
            self._sleep(
                StepShape(prefill, decodes, context, products), continues=bool(scheduled.scheduled_cached_reqs.req_ids)
            )
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=sampled,
        )

    def _computed_before(self, scheduled: Any) -> dict[str, int]:
        computed: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            self._histories.setdefault(new.req_id, TokenHistory(new.prompt_token_ids))
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return computed

    def _sleep(self, shape: StepShape, *, continues: bool) -> None:
        step_s = self._model.step_s(shape)
        if self._sigma > 0:
            step_s *= math.exp(self._random.gauss(-0.5 * self._sigma**2, self._sigma))
        time.sleep(self._clock.sleep_for(step_s, time.monotonic(), continues=continues))
