"""python -m bench.predictor_card: how well the predictor does on a live cluster, by load slice.

Starts one system with emulated workers and sends it a trace at several rates, one after the other, from idle to past
the knee. Every prediction is judged by what became of it before anything is learned from it, in the order of time, so
each is held out; the card is the predictor's own (`PredictorService.GetCard`), over all workers.

With --simulated the same loads are served in virtual time: no machine's noise explains what errors are left there.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from ascendra.v1 import predictor_pb2, predictor_pb2_grpc
from bench.live.__main__ import fitting
from bench.live.load import run_load
from bench.live.systems import SYSTEMS, Workers, running_system
from bench.live.targets import ascendra_target, prompt_of
from bench.markdown import markdown_table
from bench.metrics import Report, summarize
from bench.options import UnloadedTtft, emulated_cluster, load_profile
from bench.result_files import provenance, write_result
from bench.simulator.card import PredictionCard
from bench.simulator.systems import leaving_room, simulate, system_named
from bench.workloads import WorkloadRequest, load_trace, make_workload, slo_set
from services.common.channels import open_channel

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 8192
KV_CAPACITY_TOKENS = 380_000
DRAIN_S = 20.0
FIGURES = ("median_ape", "p90_ape", "mape", "bias", "coverage_p90")


async def card_of(address: str) -> dict[str, Any]:
    """Return the predictor's card and how many outcomes it left out, by reason."""
    channel = open_channel(address)
    try:
        stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
        answer = await stub.GetCard(predictor_pb2.GetCardRequest())
    finally:
        await channel.close(None)
    card = [
        {
            "worker_id": entry.worker_id,
            "slice": entry.slice,
            "samples": entry.samples,
            "confidence": predictor_pb2.Confidence.Name(entry.confidence),
            "note": entry.note,
            **{name: getattr(entry, name) for name in FIGURES},
        }
        for entry in answer.entries
    ]
    return {"card": card, "left_out": dict(answer.left_out)}


def loads(arguments: argparse.Namespace) -> Iterator[tuple[float, list[WorkloadRequest]]]:
    """Yield each rate with its requests."""
    trace = load_trace(arguments.trace)
    classes = slo_set(arguments.slo, UnloadedTtft(load_profile(arguments.profile)))
    for rate_rps in arguments.rates:
        requests = round(rate_rps * arguments.seconds)
        workload = make_workload(
            trace, arrivals="poisson", rate_rps=rate_rps, requests=requests, classes=classes, seed=arguments.seed
        )
        yield rate_rps, fitting(workload, MAX_MODEL_LEN)


def noted(rate_rps: float, report: Report) -> dict[str, Any]:
    """Show how a load was served and return it for the result file."""
    print(f"{rate_rps:g}/s: {report.requests} requests, joint {report.joint:.1%}", file=sys.stderr)
    return {"rate_rps": rate_rps, "report": report.as_dict()}


def run_simulated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve every load in virtual time and return the card after the last."""
    config = emulated_cluster(
        workers=arguments.workers,
        profile=arguments.profile,
        jitter_sigma=arguments.jitter_sigma,
        max_model_len=MAX_MODEL_LEN,
        kv_capacity_tokens=KV_CAPACITY_TOKENS,
        drain_s=DRAIN_S,
        seed=arguments.seed,
    )
    system = leaving_room(system_named(arguments.system), arguments.delivery_ms / 1e3)
    card = PredictionCard()
    served = [
        noted(rate_rps, summarize(simulate(system, workload, config, card=card).records))
        for rate_rps, workload in loads(arguments)
    ]
    return {"loads": served, "card": card.lines(), "left_out": {"relegated": card.relegated}}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send every load and return the card after the last."""
    workers = Workers(
        count=arguments.workers,
        model=arguments.model,
        profile=arguments.profile,
        jitter_sigma=arguments.jitter_sigma,
        max_model_len=MAX_MODEL_LEN,
        kv_capacity_tokens=KV_CAPACITY_TOKENS,
    )
    served = []
    async with running_system(SYSTEMS[arguments.system], workers, seed=arguments.seed) as system:
        async with ascendra_target([system.router], timeout_s=300) as target:
            for rate_rps, workload in loads(arguments):
                prompt = partial(prompt_of, vocab_size=VOCAB_SIZE, seed=arguments.seed)
                records = await run_load(target, workload, prompt, drain_s=DRAIN_S)
                served.append(noted(rate_rps, summarize(records)))
        return {"loads": served, **await card_of(system.predictor)}


def table(card: Sequence[Mapping[str, Any]]) -> str:
    """Render the lines of all workers together."""
    return markdown_table(
        ["slice", "predictions", "p50 error", "p90 error", "mean error", "bias", "within the stated 90% bound"],
        (
            [entry["slice"], str(entry["samples"]), *(f"{entry[name]:.1%}" for name in FIGURES)]
            for entry in card
            if not entry["worker_id"]
        ),
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.predictor_card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trace", type=Path, required=True, help="trace file; formats in bench/workloads.py")
    parser.add_argument("--simulated", action="store_true", help="in virtual time")
    parser.add_argument(
        "--delivery-ms", type=float, default=0.0, help="if simulated: room that gaps leave (default: the policy's)"
    )
    parser.add_argument("--model", type=Path, help="model directory, for its tokenizer (see demo/); not if simulated")
    parser.add_argument("--system", default="ascendra", choices=[n for n, s in SYSTEMS.items() if s.predictor])
    parser.add_argument("--rates", type=float, nargs="+", default=[12, 30, 44], help="requests per second, in turn")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each load, in seconds")
    parser.add_argument("--slo", default="1000/100", help="A, B, C or <ttft_ms>/<tbt_ms>")
    parser.add_argument("--workers", type=int, default=8, help="emulated workers")
    parser.add_argument("--profile", default="a100-llama3-8b", help="step-time profile of the emulated workers")
    parser.add_argument("--jitter-sigma", type=float, default=0.03, help="standard deviation of log(step time)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write card and loads as JSON")
    arguments = parser.parse_args()
    if not (arguments.simulated or arguments.model):
        parser.error("--model is required for a live cluster")
    return arguments


def main() -> None:
    """Run, print the card, write it."""
    arguments = parse()
    result = run_simulated(arguments) if arguments.simulated else uvloop.run(run(arguments))
    print(table(result["card"]))
    print(f"\nnot judged, by reason: {result['left_out'] or 'none'}")
    write_result(arguments.out, {**provenance(arguments), **result})


if __name__ == "__main__":
    main()
