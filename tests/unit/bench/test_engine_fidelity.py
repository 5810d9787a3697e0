"""The simulated engine against vLLM's own scheduler: same requests, same budgets, every step compared."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.simulator.engine import Engine, EngineConfig
from bench.simulator.request import SimRequest
from services.policy.state import Slo

pytestmark = pytest.mark.engine

SLO = Slo(ttft_s=1.0, tbt_s=0.1)
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """One request of a workload, arriving before a given step."""

    name: str
    step: int
    prompt: int
    output: int
    priority: int
    family: int = 0
    shared: int = 0
    """Its first tokens, which all of its family have that are that long."""

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the family, then its own."""
        return [self.family * 1000 + place for place in range(self.shared)] + [100_000 + int(self.name[1:])] * (
            self.prompt - self.shared
        )

    @property
    def prefix_hashes(self) -> tuple[int, ...]:
        """One per block, equal where all tokens up to its end are."""
        own = 1_000_000 + 1000 * int(self.name[1:])
        blocks = range(-(-self.prompt // BLOCK_TOKENS))
        return tuple(
            1000 * self.family + place if (place + 1) * BLOCK_TOKENS <= self.shared else own + place for place in blocks
        )


@dataclass
class StepLog:
    """What one step did."""

    scheduled: dict[str, int]
    preempted: list[str]
    finished: list[str]


class RealScheduler:
    """vLLM's scheduler with a model that always samples token 1."""

    def __init__(self, config: EngineConfig, model_dir: Path) -> None:
        import torch
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        (model_dir / "config.json").write_text(
            json.dumps(
                {
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "hidden_size": 64,
                    "intermediate_size": 64,
                    "num_attention_heads": 2,
                    "num_hidden_layers": 1,
                    "num_key_value_heads": 2,
                    "vocab_size": 128,
                    "max_position_embeddings": config.max_model_len,
                }
            )
        )
        model = ModelConfig(
            model=str(model_dir), skip_tokenizer_init=True, dtype="float32", max_model_len=config.max_model_len
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(config.block_tokens, sha256) if config.prefix_caching else None
        cache = CacheConfig(block_size=config.block_tokens, enable_prefix_caching=config.prefix_caching)
        blocks = config.kv_tokens // config.block_tokens
        cache.num_gpu_blocks = blocks
        vllm_config = VllmConfig(
            model_config=model,
            cache_config=cache,
            device_config=DeviceConfig("cpu"),
            scheduler_config=SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=False,
                watermark=config.watermark,
                policy="priority" if config.priority else "fcfs",
            ),
        )
        spec = FullAttentionSpec(block_size=config.block_tokens, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler: Any = Scheduler(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=config.block_tokens,
        )

    def add(self, job: Job) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.scheduler.add_request(
            Request(
                request_id=job.name,
                prompt_token_ids=job.token_ids,
                sampling_params=SamplingParams(max_tokens=job.output, ignore_eos=True),
                pooling_params=None,
                arrival_time=float(job.step),
                priority=job.priority,
                block_hasher=self._hasher,
            )
        )

    def step(self, budget: int) -> StepLog:
        from vllm.v1.outputs import ModelRunnerOutput

        scheduler = self.scheduler
        scheduler.max_num_scheduled_tokens = budget
        output = scheduler.schedule()
        preempted = sorted(output.preempted_req_ids or ())
        names = list(output.num_scheduled_tokens)
        before = set(scheduler.requests)
        sampled = [[] if scheduler.requests[name].is_prefill_chunk else [1] for name in names]
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        return StepLog(dict(output.num_scheduled_tokens), preempted, sorted(before - set(scheduler.requests)))


class Simulated:
    """The simulated engine behind the same interface."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config)

    def add(self, job: Job) -> None:
        self.engine.add(
            SimRequest(
                request_id=job.name,
                arrival_s=float(job.step),
                prompt_tokens=job.prompt,
                input_tokens=job.prompt,
                total_tokens=job.prompt,
                output_tokens=job.output,
                priority=job.priority,
                prefix_hashes=job.prefix_hashes,
                slo=SLO,
            )
        )

    def step(self, budget: int) -> StepLog:
        step = self.engine.schedule(budget)
        scheduled = {request.request_id: 1 for request in self.engine.streams}
        scheduled |= {request.request_id: tokens for request, tokens in zip(step.requests, step.tokens, strict=True)}
        finished, _ = self.engine.complete(step, 0.0)
        return StepLog(
            scheduled,
            sorted(request.request_id for request in step.preempted),
            sorted(request.request_id for request in finished),
        )


def random_jobs(rng: random.Random, count: int, max_prompt: int, max_output: int) -> list[Job]:
    """Requests of three families that arrive in clumps over the first steps."""
    jobs = []
    for index in range(count):
        prompt = rng.randint(1, max_prompt)
        step, output, priority = rng.randrange(count), rng.randint(1, max_output), rng.randrange(4)
        # At least one token is its own: what follows equal prompts would be equal too.
        shared = rng.choice((0, prompt // 2, prompt - 1))
        jobs.append(Job(f"r{index:03d}", step, prompt, output, priority, rng.randrange(1, 4), shared))
    return jobs


CASES = {
    "roomy": EngineConfig(max_num_seqs=16, max_num_batched_tokens=256, kv_tokens=65_536, max_model_len=2048),
    "few_seqs": EngineConfig(max_num_seqs=3, max_num_batched_tokens=64, kv_tokens=65_536, max_model_len=2048),
    "tight_kv": EngineConfig(max_num_seqs=16, max_num_batched_tokens=256, kv_tokens=1024, max_model_len=1008),
    "watermark": EngineConfig(
        max_num_seqs=16, max_num_batched_tokens=128, kv_tokens=2048, max_model_len=2032, watermark=0.05
    ),
    "priority": EngineConfig(
        max_num_seqs=16, max_num_batched_tokens=256, kv_tokens=1024, max_model_len=1008, priority=True
    ),
    "prefixes": EngineConfig(
        max_num_seqs=16, max_num_batched_tokens=256, kv_tokens=4096, max_model_len=2032, prefix_caching=True
    ),
    "prefixes_tight_kv": EngineConfig(
        max_num_seqs=16, max_num_batched_tokens=256, kv_tokens=1024, max_model_len=1008, prefix_caching=True
    ),
    "prefixes_priority": EngineConfig(
        max_num_seqs=16,
        max_num_batched_tokens=256,
        kv_tokens=1024,
        max_model_len=1008,
        priority=True,
        prefix_caching=True,
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_every_step_equals_vllm(case: str, seed: int, tmp_path: Path) -> None:
    """Both schedule the same tokens per request, evict the same requests and finish them in the same step."""
    config = CASES[case]
    rng = random.Random(f"{case}:{seed}")
    jobs = random_jobs(rng, 60, min(400, config.max_model_len // 3), 120)
    real, simulated = RealScheduler(config, tmp_path), Simulated(config)
    left, step, preemptions, computed = {job.name for job in jobs}, 0, 0, 0
    while left:
        for job in jobs:
            if job.step == step:
                real.add(job)
                simulated.add(job)
        # Budgets below the number of decodes are legal and skip some of them.
        budget = rng.choice((8, 64, config.max_num_batched_tokens, config.max_num_batched_tokens))
        expected, got = real.step(budget), simulated.step(budget)
        assert expected == got, f"step {step}"
        left -= set(got.finished)
        preemptions += len(got.preempted)
        computed += sum(got.scheduled.values())
        step += 1
        assert step < 20_000
    if "tight_kv" in case or "priority" in case:
        assert preemptions > 0, "the case is meant to evict"
    if case == "prefixes":
        assert computed < sum(job.prompt + job.output for job in jobs) / 1.1, "the case is meant to find prefixes"
