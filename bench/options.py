"""Command-line options that the simulator's commands share."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.simulator.cluster import ClusterConfig
from bench.simulator.engine import EngineConfig
from bench.simulator.instance import StepTimeTruth
from bench.simulator.systems import SYSTEMS, system_named
from bench.workloads import (
    MOONCAKE_BLOCK_TOKENS,
    SloClass,
    TraceRow,
    WorkloadRequest,
    load_trace,
    make_workload,
    slo_set,
)
from services.policy.step_time import PROFILES, StepShape, StepTimeModel

UNLOADED_CHUNK_TOKENS = 2048
WARMUP_SHARE = 0.2
"""Share of the requests, first to arrive, that warm the cluster up and are left out of every number: chat keeps adding
streams for as long as the longest answers run, some 20 s, before the load is what the rate says."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a command compares under: everything but system, rate and seed."""

    trace: Sequence[TraceRow]
    arrivals: str
    requests: int
    classes: Sequence[SloClass]
    cluster: ClusterConfig

    def workload(self, rate_rps: float, seed: int) -> list[WorkloadRequest]:
        """Return the requests at a rate."""
        return make_workload(
            self.trace,
            arrivals=self.arrivals,
            rate_rps=rate_rps,
            requests=self.requests,
            classes=self.classes,
            seed=seed,
        )


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Exit with a message when an option makes no sense or a file cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def at_least(least: float, **options: float) -> None:
    """Raise ValueError, with the flag's name, for an option that is below a bound or not finite."""
    for name, value in options.items():
        if not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be finite and at least {least:g}, got {value:g}")


def above_zero(**options: float) -> None:
    """Raise ValueError, with the flag's name, for an option that is not finite and above 0."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be finite and above 0, got {value:g}")


def add_setting_options(parser: argparse.ArgumentParser, *, instances: bool = True) -> None:
    """Add the options that `setting_from` reads; without --instances where the command finds their number."""
    parser.add_argument("--trace", type=Path, required=True, help="trace file; formats: see bench/workloads.py")
    parser.add_argument("--arrivals", default="poisson", help="poisson, gamma:<cv> or trace (default: %(default)s)")
    parser.add_argument(
        "--slo", default="1000/100", help="A, B, C, B/<tbt ms> or <ttft ms>/<tbt ms> (default: %(default)s)"
    )
    if instances:
        parser.add_argument("--instances", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--requests", type=int, default=0, help="per run; default: 4000, or the whole trace in its time"
    )
    add_cluster_options(parser)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `cluster_from` reads."""
    parser.add_argument(
        "--profile",
        default="a100-llama3-8b",
        help=f"step-time model: {', '.join(PROFILES)} or a JSON file (default: %(default)s)",
    )
    parser.add_argument("--jitter", type=float, default=0.03, help="sigma of log(step time) (default: %(default)s)")
    parser.add_argument("--bias", type=float, default=1.0, help="real over believed step time (default: %(default)s)")
    parser.add_argument("--no-learning", action="store_true", help="plan with --profile as it is")
    parser.add_argument("--overhead-ms", type=float, default=0.5, help="between steps (default: %(default)s)")
    parser.add_argument("--hop-ms", type=float, default=1.0, help="router to worker (default: %(default)s)")
    parser.add_argument("--staleness-ms", type=float, default=2.0, help="of reports, past a hop (default: %(default)s)")
    parser.add_argument("--kv-tokens", type=int, default=380_000, help="KV cache of an instance (default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="default: %(default)s")


def setting_from(args: argparse.Namespace) -> Setting:
    """Build a setting; exits with a message when an option makes no sense."""
    with mistakes_in_one_line():
        trace = load_trace(args.trace)
        cluster = cluster_for(trace, cluster_from(args, getattr(args, "instances", 1)))
        requests = args.requests or (len(trace) if args.arrivals == "trace" else 4000)
        classes = slo_set(args.slo, UnloadedTtft(cluster.believed))
        setting = Setting(trace, args.arrivals, requests, classes, cluster)
        setting.workload(1.0, 0)
    return setting


def cluster_from(args: argparse.Namespace, instances: int) -> ClusterConfig:
    """Build the simulated hardware and network.

    Raises:
        OSError: the step-time model is neither known nor a readable file.
        ValueError: an option makes no sense.
    """
    at_least(1, instances=instances, kv_tokens=args.kv_tokens, max_num_seqs=args.max_num_seqs)
    at_least(0, jitter=args.jitter, overhead_ms=args.overhead_ms, hop_ms=args.hop_ms, staleness_ms=args.staleness_ms)
    above_zero(bias=args.bias)
    model = load_profile(args.profile)
    return ClusterConfig(
        instances=instances,
        engine=EngineConfig(kv_tokens=args.kv_tokens, max_num_seqs=args.max_num_seqs),
        believed=model,
        truth=StepTimeTruth(model=model, bias=args.bias, jitter_sigma=args.jitter, overhead_s=args.overhead_ms / 1e3),
        learn=not args.no_learning,
        hop_s=args.hop_ms / 1e3,
        staleness_s=args.staleness_ms / 1e3,
    )


def cluster_for(trace: Sequence[TraceRow], cluster: ClusterConfig) -> ClusterConfig:
    """Return the hardware with prefix caches, in blocks as the trace has them, if it says which prompts begin alike."""
    if not any(row.prefix_hashes for row in trace):
        return cluster
    engine = replace(cluster.engine, prefix_caching=True, block_tokens=MOONCAKE_BLOCK_TOKENS)
    return replace(cluster, engine=engine)


def emulated_cluster(
    *,
    workers: int,
    profile: str,
    jitter_sigma: float,
    max_model_len: int,
    kv_capacity_tokens: int,
    drain_s: float,
    seed: int,
) -> ClusterConfig:
    """Return what serves in virtual time as the emulated workers of a live bench do. Raises as `load_profile`.

    Args:
        workers: how many.
        profile: name or file of their step-time model.
        jitter_sigma: standard deviation of log(step time).
        max_model_len: context of each, in tokens.
        kv_capacity_tokens: KV cache of each.
        drain_s: how long a run goes on after the last arrival.
        seed: of the jitter.
    """
    model = load_profile(profile)
    return ClusterConfig(
        instances=workers,
        engine=EngineConfig(kv_tokens=kv_capacity_tokens, max_model_len=max_model_len),
        believed=model,
        truth=StepTimeTruth(model=model, jitter_sigma=jitter_sigma),
        drain_s=drain_s,
        seed=seed,
    )


def systems_from(names: str) -> list[str]:
    """Return system names from a comma-separated list; exits with a message when one is unknown."""
    chosen = list(SYSTEMS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if not _is_known(name)]
    if unknown or not chosen:
        dispatches = "rr|least|work|p2c|edf|sticky|headroom|spread|rebalance"
        known = ", ".join([*SYSTEMS, f"vllm-<budget>-<{dispatches}>", "paper-<budget>"])
        sys.exit(f"error: unknown policies {', '.join(unknown)}; known: {known}")
    return chosen


def _is_known(name: str) -> bool:
    try:
        system_named(name)
    except KeyError:
        return False
    return True


def load_profile(name: str) -> StepTimeModel:
    """Return a named step-time model, or one from a JSON file.

    Raises:
        OSError: neither a known name nor a readable file.
        ValueError: not a step-time model.
    """
    if name in PROFILES:
        return PROFILES[name]
    return StepTimeModel.from_dict(json.loads(Path(name).read_text()))


@dataclass(frozen=True, slots=True)
class UnloadedTtft:
    """TTFT (s) by prompt tokens on an idle instance, in chunks of vLLM's default budget."""

    model: StepTimeModel

    def __call__(self, prompt_tokens: int) -> float:
        """Add up the steps."""
        total_s = 0.0
        for start in range(0, prompt_tokens, UNLOADED_CHUNK_TOKENS):
            chunk = min(UNLOADED_CHUNK_TOKENS, prompt_tokens - start)
            total_s += self.model.step_s(StepShape(chunk, 0, 0, chunk * start))
        return total_s
