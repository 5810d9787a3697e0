"""The systems that are compared live: the same emulated workers and the same router, under different policies.

`vllm-*` workers run vLLM's own behaviour (arrival order, static token budget, nothing given up) behind a router that
only balances; the `ascendra-*` systems switch one mechanism off or exchange it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.live.faults import KILLED, NONSENSE, PAUSED, disturb_predictor
from bench.processes import Processes
from services.policy.value_functions import VALUE_FUNCTIONS

STOCK = {"value-function": "fcfs", "token-budget": "static", "relegation": "none"}
BALANCE_ONLY: dict[str, Any] = {
    "offload": False,
    "rescue": False,
    "relief": False,
    "tickets": False,
    "admission-policy": {"max-wait-s": 0, "max-waiting": 0},
}
"""Nothing that was placed moves, and nobody is turned away."""


@dataclass(frozen=True, kw_only=True)
class System:
    """How workers and router are configured."""

    hp: int = 1
    """HP workers of those there are; 0: all unified."""
    worker: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    predictor: bool = True
    predictor_fault: str = ""
    """What befalls the predictor in the midst of the run (bench.live.faults)."""


def _stock(placement: str, budget_tokens: int) -> System:
    return System(
        hp=0,
        worker={**STOCK, "static-budget-tokens": budget_tokens},
        router={**BALANCE_ONLY, "placement": placement},
        predictor=False,
    )


def _order(value_function: str) -> System:
    return System(worker={"value-function": value_function})


STATIC_BUDGETS = (2048, 1024, 896, 768, 640, 512, 256)
"""Tokens of a step: vLLM's default, and others to find the best one."""
SYSTEMS: dict[str, System] = {
    **{f"vllm-rr-{tokens}": _stock("round_robin", tokens) for tokens in STATIC_BUDGETS},
    **{f"vllm-least-{tokens}": _stock("least_requests", tokens) for tokens in STATIC_BUDGETS},
    **{f"vllm-sticky-{tokens}": _stock("prefix_affine", tokens) for tokens in STATIC_BUDGETS},
    **{f"vllm-work-{tokens}": _stock("least_predicted_work", tokens) for tokens in STATIC_BUDGETS},
    "unified": System(hp=0),
    "ascendra": System(),
    "ascendra-2hp": System(hp=2),
    "ascendra-late": System(hp=0, router={"placement": "late"}),
    "ascendra-late-split": System(router={"placement": "late"}),
    "ascendra-no-offload": System(router={"offload": False, "rescue": False}),
    "ascendra-no-rescue": System(router={"rescue": False}),
    "ascendra-no-relief": System(router={"relief": False}),
    "ascendra-no-tickets": System(router={"tickets": False}),
    "ascendra-static-512": System(worker={"token-budget": "static", "static-budget-tokens": 512}),
    "ascendra-never-calm": System(worker={"calm-factor": 0}),
    "ascendra-no-relegation": System(worker={"relegation": "none"}),
    "ascendra-no-predictor": System(predictor=False),
    **{f"ascendra-predictor-{fault}": System(predictor_fault=fault) for fault in (KILLED, PAUSED, NONSENSE)},
    "ascendra-elastic": System(router={"elastic-roles": True}),
    **{f"ascendra-{name}": _order(name) for name in sorted(VALUE_FUNCTIONS)},
    "paper": System(
        worker={
            "value-function": "llf",
            "token-budget": "static",
            "static-budget-tokens": 512,
            "relegation": "none",
        },
        router={
            "placement": "least_requests",
            "rescue": False,
            "relief": False,
            "hp-fill": 0,
            "admission-policy": BALANCE_ONLY["admission-policy"],
        },
    ),
}
DEFAULT_ORDER = "ascendra-edf"
"""The same as "ascendra": edf is the default value function."""
TABLE = [
    *("vllm-rr-2048", "vllm-rr-768", "vllm-rr-640", "vllm-least-640", "vllm-work-768", "paper", "unified"),
    *("ascendra", "ascendra-2hp"),
    *("ascendra-late", "ascendra-late-split", "ascendra-no-offload", "ascendra-no-tickets", "ascendra-static-512"),
    *("ascendra-never-calm", "ascendra-no-relegation", "ascendra-no-predictor"),
    *(f"ascendra-predictor-{fault}" for fault in (KILLED, PAUSED, NONSENSE)),
    *(f"ascendra-{name}" for name in sorted(VALUE_FUNCTIONS) if f"ascendra-{name}" != DEFAULT_ORDER),
]
"""What `--systems table` stands for: baselines, Ascendra's variants, and one mechanism less or exchanged."""


WORKER_NICENESS = 10
"""Workers give way to the router and the client, which in a deployment have cores of their own: a router that waits for
its turn on two busy cores holds back the tokens of whole steps."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What every system runs on."""

    count: int
    model: Path
    """Directory whose tokenizer the router uses; the engine is emulated."""
    profile: str
    """Step-time profile by name or file."""
    jitter_sigma: float
    max_model_len: int
    kv_capacity_tokens: int
    prefix_caching: bool = False


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """Where a system can be reached."""

    router: str = ""
    """Empty: it has none."""
    predictor: str = ""
    """Empty: it has none."""
    step_logs: Mapping[str, Path] = field(default_factory=dict)
    """Of its workers, by id, if it was started here; gone when it has stopped."""


@contextlib.asynccontextmanager
async def running_system(system: System, workers: Workers, *, seed: int) -> AsyncIterator[RunningSystem]:
    """Start a system, and stop it at the end."""
    async with Processes() as processes:
        predictor, predictor_pid = "", 0
        if system.predictor:
            predictor, predictor_pid = await processes.start_service(
                "services.predictor", {"listen": "127.0.0.1:0", "metrics-listen": "127.0.0.1:0"}
            )
        configs = [_worker_config(system, workers, index, predictor, seed) for index in range(workers.count)]
        step_logs = {config["worker-id"]: processes.folder / f"{config['worker-id']}.jsonl" for config in configs}
        configs = [config | {"step-log": str(step_logs[config["worker-id"]])} for config in configs]
        addresses, _ = await processes.start_workers(configs, niceness=WORKER_NICENESS)
        router = {
            "listen": "127.0.0.1:0",
            "metrics-listen": "127.0.0.1:0",
            "workers": addresses,
            "predictor": predictor,
            "model": str(workers.model),
            **system.router,
        }
        address, _ = await processes.start_service("services.router", router)
        async with asyncio.TaskGroup() as tasks:
            names = [config["worker-id"] for config in configs]
            fault = disturb_predictor(system.predictor_fault, predictor_pid, predictor, names)
            disturbing = tasks.create_task(fault)
            yield RunningSystem(address, predictor, step_logs)
            disturbing.cancel()


def _worker_config(system: System, workers: Workers, index: int, predictor: str, seed: int) -> dict[str, Any]:
    high = index >= workers.count - system.hp
    return {
        "listen": "127.0.0.1:0",
        "worker-id": f"w{index}",
        "role": "unified" if system.hp == 0 else "high" if high else "low",
        "engine": "emulated",
        "model": str(workers.model),
        "max-model-len": workers.max_model_len,
        "kv-capacity-tokens": workers.kv_capacity_tokens,
        "step-time-profile": workers.profile,
        "jitter-sigma": workers.jitter_sigma,
        "prefix-caching": workers.prefix_caching,
        "predictor": predictor,
        "seed": seed * 1000 + index,
        **system.worker,
    }
