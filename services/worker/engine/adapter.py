"""The only front-end module that imports vLLM: `contract.Engine` over `AsyncLLM`.

It touches vLLM's stable surface only: AsyncEngineArgs, AsyncLLM.from_vllm_config / generate / shutdown / errored,
SamplingParams, ModelRegistry, envs.enable_envs_cache and EngineCoreClient.call_utility_async.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import vllm
from vllm.config import KVTransferConfig, StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import ModelRegistry
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from ascendra.v1 import common_pb2
from services.common.logging import get_logger
from services.worker.engine.contract import (
    Delta,
    EngineDead,
    EngineInfo,
    EngineRequest,
    KvExport,
    KvTransferInfo,
    KvUnavailable,
    RejectedByEngine,
    StepReport,
    WithdrawOutcome,
)
from services.worker.engine.kv_transfer import connector_config, encode_handle, provide_nixl, read_handle, reserved_port
from services.worker.engine.settings import EngineSettings
from services.worker.engine.start_limit import start_limit

log = get_logger()

_SCHEDULER = "services.worker.engine.core.scheduler.make_scheduler"
_EXECUTOR = "services.worker.engine.core.emulated.EmulatedExecutor"
_LOGITS_PROCESSORS = [
    "services.worker.engine.core.sampling:PositionKeyedSampler",
    "services.worker.engine.core.sampling:ResumedPenalties",
]
_CONTROL_TIMEOUT_S = 30.0
"""A control call is answered after the running step; one that takes longer means a hung engine."""
_UNREAD_S = 1.0
"""For an answer that came while this process was held up."""
_MAX_SEED = (1 << 63) - 1
_EMULATED_SHAPE = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}


class _NoStats(StatLoggerBase):
    """Its presence keeps vLLM's Prometheus metrics on without vLLM's log lines."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """Accept what vLLM passes."""

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Record nothing."""

    def log_engine_initialized(self) -> None:
        """Say nothing."""


class VllmEngine:
    """A started AsyncLLM with our scheduler in its engine core."""

    def __init__(
        self, llm: AsyncLLM, info: EngineInfo, settings: EngineSettings, reports: socket.socket, scratch: Path
    ) -> None:
        self.info = info
        self._llm = llm
        self._settings = settings
        self._reports = reports
        self._scratch = scratch
        self._callbacks: list[Callable[[StepReport], None]] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(reports.fileno(), self._read_reports)

    @classmethod
    async def start(cls, settings: EngineSettings) -> "VllmEngine":
        """Start the engine core (blocks the loop: nothing else may run yet) and learn its facts."""
        scratch = Path(tempfile.mkdtemp(prefix="ascendra-worker-"))
        reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            reports.setblocking(False)
            reports.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            reports.bind(str(scratch / "reports"))
            with start_limit(settings.start_timeout_s), _kv_port(settings) as kv_port:
                config = _engine_config(settings, scratch, kv_port)
                llm = AsyncLLM.from_vllm_config(config, stat_loggers=[_NoStats], disable_log_stats=True)
            own_scheduler = config.scheduler_config.scheduler_cls is not None
            # vLLM reads its environment for every token otherwise; the engine core has done this by itself.
            vllm.envs.enable_envs_cache()
            facts = await _control(llm, "describe", []) if own_scheduler else {}
            info = EngineInfo(
                engine=settings.engine,
                version=vllm.__version__,
                max_model_len=config.model_config.max_model_len,
                vocab_size=config.model_config.get_vocab_size(),
                max_num_seqs=config.scheduler_config.max_num_seqs,
                max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
                kv_capacity_tokens=int(facts.get("kv_capacity_tokens", 0)),
                prefix_block_tokens=int(facts.get("prefix_block_tokens", 0)),
                guided_decoding=not config.model_config.skip_tokenizer_init,
                logprobs=settings.engine != "emulated",
                policies=own_scheduler,
                dtype=str(config.model_config.dtype).removeprefix("torch."),
                # Elsewhere our logits processors see to both; CUDA's runner V2 keys noise by itself, but lets
                # penalties count the tokens of this attempt only.
                keyed_noise=settings.engine != "cuda" or bool(config.use_v2_model_runner),
                carried_penalties=settings.engine != "cuda",
                kv_transfer=_kv_transfer_info(settings, facts.get("kv_transfer")),
            )
            return cls(llm, info, settings, reports, scratch)
        except BaseException:
            reports.close()
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Run a request; the last delta has a finish."""
        standing = request.standing
        deadline_ms = round((standing.arrival_s + standing.ttft_slo_s) * 1000)
        sampling = self._sampling_params(request)
        if request.kv_handle:
            self._read_kv(request, sampling)
        try:
            # A typed dict is taken as it is; an untyped prompt goes through a thread pool, out of order. One with a
            # constraint has to: that is parsed where the request is checked, for as long as it takes.
            typed = {} if sampling.structured_outputs else {"type": "token"}
            outputs = self._llm.generate(
                cast("Any", {**typed, "prompt_token_ids": request.token_ids}),
                sampling,
                standing.request_id,
                priority=deadline_ms if not self.info.policies else 0,
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield _delta(output)
        except EngineDeadError as error:
            raise EngineDead("the engine core died") from error
        except (VLLMValidationError, ValueError) as error:
            raise RejectedByEngine(str(error)) from error
        except EngineGenerateError as error:
            raise RejectedByEngine(str(error.__cause__ or error)) from error

    async def withdraw(self, request_ids: Sequence[str]) -> WithdrawOutcome:
        """Take back requests that were never scheduled, atomically."""
        if not self.info.policies:
            return WithdrawOutcome(withdrawn=(), unknown=())
        answer = await self._control("withdraw", [list(request_ids)])
        return WithdrawOutcome(withdrawn=tuple(answer["withdrawn"]), unknown=tuple(answer["unknown"]))

    async def release(self, request_ids: Sequence[str]) -> None:
        """Return when the engine holds none of these any more."""
        if self.info.policies:
            await self._control("release", [list(request_ids)])

    async def export_kv(self, request_id: str) -> KvExport:
        """Take a running request out, between two steps, and keep its KV. Raises KvUnavailable."""
        if self.info.kv_transfer is None:
            raise KvUnavailable("the engine hands no KV over")
        exported = await self._control("export_kv", [request_id])
        if "refused" in exported:
            raise KvUnavailable(exported["refused"])
        return KvExport(handle=encode_handle(exported), generated_tokens=exported["generated"])

    async def release_kv(self, request_ids: Sequence[str]) -> None:
        """Free the KV of exported requests that nobody reads any more."""
        if self.info.kv_transfer is not None and request_ids:
            await self._control("release_kv", [list(request_ids)])

    async def reprioritise(self, request_ids: Sequence[str], *, relegated: bool) -> None:
        """Relegate or reinstate waiting requests."""
        if self.info.policies:
            await self._control("reprioritise", [list(request_ids), relegated])

    async def set_policy(self, role: str, value_function: str, token_budget: str, relegation: str) -> None:
        """Change role and policies from the next step on."""
        if self.info.policies:
            await self._control("set_policy", [role, value_function, token_budget, relegation])

    async def set_step_time_model(self, model: common_pb2.StepTimeModel) -> None:
        """Let the engine plan with a model learned elsewhere."""
        if self.info.policies:
            await self._control("set_step_time_model", [model.SerializeToString().hex()])

    async def set_delivery(self, gap_inflation_s: float) -> None:
        """Leave room in every gap for what passes outside the engine, in seconds."""
        if self.info.policies:
            await self._control("set_delivery", [gap_inflation_s])

    async def step_time_model(self) -> common_pb2.StepTimeModel:
        """Return the model that the engine plans with; empty when the stock scheduler runs."""
        if not self.info.policies:
            return common_pb2.StepTimeModel()
        return common_pb2.StepTimeModel.FromString(bytes.fromhex(await self._control("step_time_model", [])))

    def on_report(self, callback: Callable[[StepReport], None]) -> None:
        """Have a function called on the loop with every report."""
        self._callbacks.append(callback)

    def is_alive(self) -> bool:
        """Tell whether the engine core runs."""
        return not self._llm.errored

    async def close(self) -> None:
        """Stop the engine core."""
        self._loop.remove_reader(self._reports.fileno())
        self._reports.close()
        await asyncio.to_thread(self._llm.shutdown)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def abandon(self) -> None:
        """Leave nothing behind of an engine whose core is dead; the process must end now."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    async def _control(self, method: str, arguments: list[Any]) -> Any:
        if not self.is_alive():
            raise EngineDead("the engine core died")
        return await _control(self._llm, method, arguments)

    def _read_reports(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(256):  # then let the loop do something else
                self._tell(StepReport.decode(self._reports.recv(1 << 20)))

    def _tell(self, report: StepReport) -> None:
        for callback in self._callbacks:
            callback(report)

    def _read_kv(self, request: EngineRequest, sampling: SamplingParams) -> None:
        """Have the connector read the KV of a request's tokens; report it when that cannot be."""
        params = read_handle(request.kv_handle, len(request.token_ids)) if self.info.kv_transfer is not None else None
        if params is None:
            log.warning("kv_handle_useless", request_id=request.standing.name)
            self._tell(StepReport(kv_failed=[request.standing.request_id]))
            return
        sampling.extra_args = {**(sampling.extra_args or {}), "kv_transfer_params": params}

    def _sampling_params(self, request: EngineRequest) -> SamplingParams:
        given, standing = request.sampling, request.standing
        temperature = given.temperature if given.HasField("temperature") else 1.0
        extra: dict[str, Any] = {name: getattr(standing, name) for name in type(standing).__slots__}
        seed = (given.seed & _MAX_SEED) if given.HasField("seed") and temperature > 0 else None
        if seed is not None and self._settings.engine == "cpu":
            # The CPU runner's own generators restart with every attempt; ours are keyed by position.
            extra["seed"], seed = seed, None
        return SamplingParams(
            temperature=temperature,
            top_p=given.top_p if given.HasField("top_p") else 1.0,
            top_k=given.top_k,
            min_p=given.min_p,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else 1.0,
            seed=seed,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop_token_ids=list(given.stop_token_ids) or None,
            ignore_eos=given.ignore_eos,
            logprobs=given.logprobs if given.HasField("logprobs") else None,
            logit_bias=dict(given.logit_bias) or None,
            allowed_token_ids=list(given.allowed_token_ids) or None,
            bad_words=list(given.bad_words) or None,
            structured_outputs=_structured_outputs(given),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"ascendra": extra},
        )


def register_llama() -> None:
    """Tell vLLM's registry the class of Llama models, which it would import in a process of its own for every worker.

    That protects CUDA from forks and takes ten seconds a worker unless a cache of another start is at hand: for
    engines without CUDA only.
    """
    from vllm.model_executor.models.llama import LlamaForCausalLM

    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)


async def _control(llm: AsyncLLM, method: str, arguments: list[Any]) -> Any:
    """Run a method of our scheduler in the engine core, between two steps."""
    call = asyncio.ensure_future(llm.engine_core.call_utility_async("ascendra_control", method, json.dumps(arguments)))
    try:
        # Twice: where this process itself was held up for so long, the answer may be here and not read yet.
        for limit_s in (_CONTROL_TIMEOUT_S, _UNREAD_S):
            await asyncio.wait([call], timeout=limit_s)
            if call.done():
                return call.result()
    except EngineDeadError as error:
        raise EngineDead(f"the engine core died before it answered {method}") from error
    finally:
        call.cancel()
    raise EngineDead(f"the engine core did not answer {method}")


def _kv_port(settings: EngineSettings) -> contextlib.AbstractContextManager[int]:
    return reserved_port(settings.kv_transfer.host) if settings.kv_transfer else contextlib.nullcontext(0)


def _engine_config(settings: EngineSettings, scratch: Path, kv_port: int = 0) -> Any:
    emulated = settings.engine == "emulated"
    model = settings.model
    if emulated:
        model = str(_emulated_model(settings, scratch))
    ours: dict[str, Any] = {
        "reports": str(scratch / "reports"),
        "policy": settings.policy.to_dict(),
        "step_time_model": settings.step_time.to_dict() if settings.step_time else None,
    }
    options: dict[str, Any] = {
        "model": model,
        "served_model_name": settings.served_model_name,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "enable_prefix_caching": settings.prefix_caching,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "skip_tokenizer_init": emulated or not settings.guided_decoding,
        "additional_config": {"ascendra": ours},
        # "auto" checks each constraint against two back ends, and compiles all with the one that suited the first.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar"),
    }
    if settings.executor != "auto":
        options["distributed_executor_backend"] = settings.executor
    if settings.kv_cache_memory_bytes:
        options["kv_cache_memory_bytes"] = settings.kv_cache_memory_bytes
    if settings.engine == "cpu":
        options |= {"enforce_eager": True, "logits_processors": _LOGITS_PROCESSORS}
    if emulated:
        if settings.emulated_step_time is None:
            raise ValueError("the emulated engine needs a step-time model")
        ours["emulation"] = {
            "step_time_model": settings.emulated_step_time.to_dict(),
            "kv_capacity_tokens": settings.kv_capacity_tokens,
            "jitter_sigma": settings.jitter_sigma,
            "seed": settings.seed,
        }
        options |= {"enforce_eager": True, "dtype": "float32", "block_size": 16}
        options["distributed_executor_backend"] = _resolve(_EXECUTOR)
    if settings.kv_transfer is not None and _can_transfer_kv(settings.engine):
        connector = connector_config(settings.kv_transfer, settings.engine, kv_port)
        options["kv_transfer_config"] = KVTransferConfig(**connector)
    if settings.stock_scheduler or not _scheduler_fits():
        log.warning("stock_priority_scheduling", vllm=vllm.__version__, asked_for=settings.stock_scheduler)
        options["scheduling_policy"] = "priority"
    else:
        options["scheduler_cls"] = _SCHEDULER
    config = AsyncEngineArgs(**options).create_engine_config()
    if settings.async_scheduling != "auto":
        # Set on the finished configuration: the CPU platform turns it off while one is made.
        config.scheduler_config.async_scheduling = settings.async_scheduling == "on"
    if settings.engine != "cuda":
        # The CPU platform asks for spawn, which imports everything again; nothing here forbids fork.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return config


def _can_transfer_kv(engine: str) -> bool:
    from services.worker.engine.core.compatibility import kv_transfer_mismatches

    mismatches = []
    if engine == "cpu":
        try:
            provide_nixl()  # before anything imports the connector, which looks for it once
        except ImportError as error:
            mismatches.append(f"NIXL does not load: {error}")
    mismatches += kv_transfer_mismatches()
    for mismatch in mismatches:
        log.warning("kv_transfer_off", vllm=vllm.__version__, what=mismatch)
    return not mismatches


def _kv_transfer_info(settings: EngineSettings, described: dict[str, Any] | None) -> KvTransferInfo | None:
    if settings.kv_transfer is None or not described:
        return None
    return KvTransferInfo(
        compatibility=f"{vllm.__version__} {described['compatibility']}",
        bytes_per_token=described["bytes_per_token"],
        lease_s=settings.kv_transfer.lease_s,
    )


def _scheduler_fits() -> bool:
    from services.worker.engine.core.compatibility import scheduler_mismatches

    mismatches = scheduler_mismatches()
    for mismatch in mismatches:
        log.warning("scheduler_mismatch", vllm=vllm.__version__, what=mismatch)
    return not mismatches


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _emulated_model(settings: EngineSettings, scratch: Path) -> Path:
    """Write a model directory without weights: the vocabulary and context of the real model, if one is named."""
    vocab_size, eos_token_id, bos_token_id = settings.vocab_size, 2, 1
    if settings.model:
        named = json.loads((Path(settings.model) / "config.json").read_text())
        vocab_size = named["vocab_size"]
        eos_token_id = named.get("eos_token_id", eos_token_id)
        bos_token_id = named.get("bos_token_id", bos_token_id)
    directory = scratch / "model"
    directory.mkdir()
    config = _EMULATED_SHAPE | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "max_position_embeddings": settings.max_model_len,
        "eos_token_id": eos_token_id,
        "bos_token_id": bos_token_id,
        "num_key_value_heads": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _structured_outputs(sampling: common_pb2.SamplingParameters) -> StructuredOutputsParams | None:
    match sampling.structured_output.WhichOneof("constraint"):
        case "json_schema":
            return StructuredOutputsParams(json=sampling.structured_output.json_schema)
        case "regex":
            return StructuredOutputsParams(regex=sampling.structured_output.regex)
        case "grammar":
            return StructuredOutputsParams(grammar=sampling.structured_output.grammar)
        case _:
            return None


def _delta(output: Any) -> Delta:
    completion = output.outputs[0]
    stop = completion.stop_reason
    return Delta(
        token_ids=completion.token_ids,
        finish=completion.finish_reason or "",
        stop_token_id=stop if isinstance(stop, int) else None,
        cached_prompt_tokens=output.num_cached_tokens or 0,
        logprobs=_logprobs(completion) if completion.logprobs else (),
    )


def _logprobs(completion: Any) -> tuple[common_pb2.PositionLogprobs, ...]:
    positions = []
    for token_id, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        ranked = sorted(candidates.items(), key=lambda item: item[1].rank or 0)
        entries = {
            candidate: common_pb2.TokenLogprob(token_id=candidate, logprob=value.logprob, rank=value.rank or 0)
            for candidate, value in ranked
        }
        # Only the sampled token may rank beyond those asked for; it then stands beside them, not among them.
        top = [entry for candidate, entry in entries.items() if candidate != token_id or entry.rank < len(entries)]
        positions.append(common_pb2.PositionLogprobs(sampled=entries[token_id], top=top))
    return tuple(positions)
