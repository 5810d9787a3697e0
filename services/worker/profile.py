"""`python -m services.worker.profile --config worker.yaml --out FILE`: measure an engine, write its step-time model.

Runs a sweep of prefills, decodes and contexts through the worker's own engine and scheduler, fits the model to the
telemetry, and judges it on steps it was not fitted to. A worker starts from the file with `--step-time-profile FILE`,
the simulator with `--profile FILE`.
"""

import asyncio
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendra.v1 import common_pb2
from services.common.config import load_config, option
from services.common.lifecycle import run_service
from services.common.logging import configure_logging, get_logger
from services.policy.step_profile import ImpossibleFit, ProfileFit, Step, fit_profile
from services.policy.step_time import StepShape
from services.worker.app import EXIT_ENGINE_DIED
from services.worker.config import WorkerConfig
from services.worker.engine.contract import (
    Engine,
    EngineDead,
    EngineRequest,
    RejectedByEngine,
    RequestStanding,
    StepReport,
)
from services.worker.engine.environment import prepare_environment
from services.worker.engine.settings import EngineSettings, PolicySettings
from services.worker.sweep import Limits, Scene, scenes

log = get_logger()

_SCENE_LIMIT_S = 300.0
_NEVER_S = 1e9
_POOR_ERROR = 0.15
"""Mean error on held-out steps above which something else disturbed the engine."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(WorkerConfig):
    """Measures the step times of a worker's engine; of a worker's keys, those about the engine count."""

    out: str = option("", "file that receives the step-time model")
    seconds: float = option(60.0, "time to measure, in seconds; the scene that runs then is finished")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise ValueError("out must name a file")
        if not self.seconds > 0:
            raise ValueError("seconds must be above 0")

    def engine_settings(self) -> EngineSettings:
        """Return the worker's engine with every prefill computed, in order of arrival, under one budget."""
        policy = PolicySettings(
            value_function="fcfs",
            token_budget="static",
            static_budget_tokens=self.max_num_batched_tokens,
            relegation="none",
        )
        settings = super().engine_settings()
        return dataclasses.replace(settings, prefix_caching=False, guided_decoding=False, policy=policy)


class Recorder:
    """Plays scenes on an engine and keeps what its steps took."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.steps: list[Step] = []
        self._engine = engine
        self._random = random.Random(seed)
        self._requests = 0
        engine.on_report(self._on_report)

    async def play(self, scene: Scene) -> None:
        """Run a scene to its end. Raises EngineDead or RejectedByEngine in a group, or TimeoutError."""
        async with asyncio.timeout(_SCENE_LIMIT_S), asyncio.TaskGroup() as group:
            for _ in range(scene.decodes):
                group.create_task(self._run(scene.context_tokens, scene.output_tokens))
            for prompt_tokens in scene.prefills:
                await self._run(prompt_tokens, 1)

    async def _run(self, prompt_tokens: int, output_tokens: int) -> None:
        self._requests += 1
        name = f"p{self._requests}"
        request = EngineRequest(
            standing=RequestStanding(
                request_id=name, name=name, arrival_s=time.monotonic(), ttft_slo_s=_NEVER_S, tbt_slo_s=_NEVER_S
            ),
            token_ids=[self._random.randrange(self._engine.info.vocab_size) for _ in range(prompt_tokens)],
            max_tokens=output_tokens,
            min_tokens=output_tokens,
            sampling=common_pb2.SamplingParameters(temperature=0.0, ignore_eos=True),
        )
        async for _ in self._engine.generate(request):
            pass

    def _on_report(self, report: StepReport) -> None:
        if (step := report.step) is not None:
            shape = StepShape(
                step.prefill_tokens, step.decodes, step.decode_context_tokens, step.prefill_context_products
            )
            self.steps.append((shape, step.step_s))


async def measure(engine: Engine, seconds: float, stop: asyncio.Event, seed: int = 0) -> list[Step]:
    """Return the steps of a sweep, in order of time; the first scene warms the engine up and is left out."""
    info = engine.info
    limits = Limits(
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        kv_capacity_tokens=info.kv_capacity_tokens,
    )
    recorder = Recorder(engine, seed)
    upcoming = scenes(limits, seed)
    await recorder.play(next(upcoming))
    recorder.steps.clear()
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s and not stop.is_set():
        scene = next(upcoming)
        log.info("scene", steps=len(recorder.steps), **dataclasses.asdict(scene))
        await recorder.play(scene)
    return recorder.steps


async def run_profile(config: ProfileConfig, stop: asyncio.Event) -> int:
    """Measure, fit, write and print; returns the exit status, 1 when there is no model to write."""
    from services.worker.engine.adapter import VllmEngine

    engine = await VllmEngine.start(config.engine_settings())
    steps: list[Step] = []
    failure = ""
    try:
        if engine.info.policies:
            steps = await measure(engine, config.seconds, stop, config.seed)
        else:
            failure = "the worker's scheduler does not fit this vLLM, and only it reports step times"
    except* (EngineDead, RejectedByEngine, TimeoutError) as group:
        failure = f"the engine failed: {group.exceptions[0]!r}"
    finally:
        if engine.is_alive():
            await engine.close()
        else:
            # What is left of a dead engine may hang in its own clean-up.
            engine.abandon()
            _refuse("the engine died")
            os._exit(EXIT_ENGINE_DIED)
    if failure or stop.is_set():
        return _refuse(failure or "interrupted")
    try:
        fit = fit_profile(steps, source=f"profile:{config.effective_model_name}")
    except ImpossibleFit as error:
        return _refuse(str(error))
    about = {"engine": config.engine, "vllm": engine.info.version, "model": config.effective_model_name}
    _write(Path(config.out), fit, about)
    sys.stdout.write(f"{summary(fit, steps)}\nwritten to {config.out}\n")
    return 0


def summary(fit: ProfileFit, steps: Sequence[Step]) -> str:
    """Lay a fit out for reading."""
    most = {name: max(getattr(shape, name) for shape, _ in steps) for name in StepShape.__slots__}
    lines = [f"{len(steps)} steps; the largest of each: " + ", ".join(f"{name} {n}" for name, n in most.items())]
    for bin in fit.model.bins:
        limit = (
            f"<= {bin.max_tokens} tokens" if bin.max_tokens else "any size" if len(fit.model.bins) == 1 else "larger"
        )
        lines.append(
            f"{limit:<16}{1e3 * bin.a0:.3f} ms + {1e6 * bin.prefill_token_s:.3f} us a prefill token"
            f" + {1e6 * (bin.a1 + bin.a3):.3f} us a decode + {1e9 * bin.a4:.3f} ns a token of decode context"
            f" + {1e12 * bin.a5:.3f} ps a prefill token x token before it"
        )
    lines.append(f"safety factor {fit.model.safety_factor:.3f}, spread {fit.model.log_sigma:.3f}")
    for name, quality in fit.held_out.items():
        lines.append(
            f"held out, {name}: {quality.steps} steps, error {quality.mape:.1%}, bias {quality.bias:+.1%},"
            f" within the planned time {quality.coverage:.1%}"
        )
    if fit.held_out["all"].mape > _POOR_ERROR:
        lines.append("warning: step times scatter; measure again while nothing else uses the machine")
    return "\n".join(lines)


def _write(path: Path, fit: ProfileFit, about: dict[str, Any]) -> None:
    quality = {name: dataclasses.asdict(held_out) for name, held_out in fit.held_out.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**fit.model.to_dict(), "profile": {**about, "held_out": quality}}, indent=1) + "\n")


def _refuse(why: str) -> int:
    sys.stderr.write(f"error: no step-time model: {why}\n")
    return 1


def main() -> int:
    """Run the command; returns the exit status."""
    config = load_config(ProfileConfig, program="python -m services.worker.profile")
    configure_logging("profile", level=config.log_level)
    prepare_environment(config.engine, config.cpu_threads)
    return run_service(lambda stop: run_profile(config, stop))


if __name__ == "__main__":
    sys.exit(main())
