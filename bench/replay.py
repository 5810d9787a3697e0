"""Counterfactual replay: the requests of a router's decision log, decided again in the simulator.

python -m bench.replay decisions.jsonl --policy unified --profile profile.json --out replay.json

Each request is shown three times: as recorded, as simulated under the system that was recorded (what the simulator
gets wrong shows here), and as simulated under the other system. Only the last two differ by policy alone.
"""

import argparse
import enum
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.metrics import Outcome, RequestRecord, meets_tbt, meets_ttft
from bench.options import add_cluster_options, cluster_from, mistakes_in_one_line, systems_from
from bench.result_files import provenance, write_result
from bench.simulator.cluster import ClusterConfig
from bench.simulator.systems import System, simulate, system_named
from bench.workloads import WorkloadRequest
from services.policy.state import Slo


class Verdict(enum.StrEnum):
    """What a request's caller would say of it."""

    ATTAINED = "attained"
    LATE = "TTFT missed"
    SLOW = "TBT missed"
    LATE_AND_SLOW = "TTFT and TBT missed"
    REFUSED = "refused"
    LOST = "not finished"
    CANCELLED = "cancelled"
    """By its caller: it is load in the replay, and not compared."""


class LogFormatError(ValueError):
    """A line of a decision log cannot be read; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What decision logs say."""

    workload: list[WorkloadRequest]
    """In order of arrival, the first at 0 s. Prompt tokens that came from a prefix cache are left out."""
    verdicts: dict[str, Verdict]
    """By request id."""
    workers: int
    """Workers that requests were sent to."""
    decisions: dict[str, tuple[str, ...]]
    """Kinds of decisions about each request, by request id."""


@dataclass(frozen=True, slots=True)
class Change:
    """A request that ends differently under the two simulated systems."""

    request_id: str
    slo_class: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    decisions: tuple[str, ...]
    recorded: Verdict
    same_policy: Verdict
    other_policy: Verdict
    ttft_s: tuple[float | None, float | None]
    """Under the recorded system and under the other one; None without a first token."""


def read_logs(paths: Sequence[Path]) -> Recording:
    """Read the logs of the routers of one host (they share its monotonic clock).

    Raises:
        LogFormatError: a line is not what the router writes.
        ValueError: no request of the logs has ended.
        OSError: a file cannot be read.
    """
    ends: dict[str, dict[str, Any]] = {}
    kinds: dict[str, list[str]] = {}
    workers: set[str] = set()
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                kinds.setdefault(line["request_id"], []).append(line["kind"])
                workers.add(line.get("to") or "")
                if line["kind"] == "end":
                    ends[_unused(line["request_id"], ends)] = _checked(line)
            except (ValueError, KeyError, TypeError) as error:
                raise LogFormatError(f"{path}: line {number}: not a line of a decision log: {error!r}") from error
    if not ends:
        raise ValueError("no request of the log has ended")
    start_s = min(line["arrival_s"] for line in ends.values())
    finished = [line["output_tokens"] for line in ends.values() if line["outcome"] == "finished"]
    typical = round(statistics.median(finished)) if finished else 1
    workload = [_request(request_id, line, start_s, typical) for request_id, line in ends.items()]
    return Recording(
        workload=sorted(workload, key=lambda request: request.arrival_s),
        verdicts={request_id: _recorded(line) for request_id, line in ends.items()},
        workers=len(workers - {""}),
        decisions={request_id: tuple(kinds[line["request_id"]]) for request_id, line in ends.items()},
    )


def verdict(record: RequestRecord) -> Verdict:
    """Return what became of a simulated request."""
    if record.outcome is Outcome.REFUSED:
        return Verdict.REFUSED
    if record.outcome is not Outcome.FINISHED:
        return Verdict.LOST
    return _judge(meets_ttft(record), meets_tbt(record))


def replay(recording: Recording, system: System, config: ClusterConfig) -> dict[str, RequestRecord]:
    """Simulate the recorded requests under a system; records by request id."""
    return {record.request_id: record for record in simulate(system, recording.workload, config).records}


def changes(recording: Recording, same: dict[str, RequestRecord], other: dict[str, RequestRecord]) -> list[Change]:
    """Return the requests whose verdict differs between the two systems, in order of arrival."""
    found = []
    for request in recording.workload:
        ours, theirs = same[request.request_id], other[request.request_id]
        before, after = verdict(ours), verdict(theirs)
        if before is after or recording.verdicts[request.request_id] is Verdict.CANCELLED:
            continue
        found.append(
            Change(
                request_id=request.request_id,
                slo_class=request.slo_class,
                arrival_s=request.arrival_s,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                decisions=recording.decisions[request.request_id],
                recorded=recording.verdicts[request.request_id],
                same_policy=before,
                other_policy=after,
                ttft_s=(_finite(ours.ttft_s), _finite(theirs.ttft_s)),
            )
        )
    return found


def _request(request_id: str, line: dict[str, Any], start_s: float, typical_output: int) -> WorkloadRequest:
    output = line["output_tokens"]
    if line["outcome"] not in ("finished", "cancelled"):
        # What it would have generated is unknown.
        output = max(output, min(typical_output, line["max_tokens"]))
    return WorkloadRequest(
        request_id=request_id,
        arrival_s=line["arrival_s"] - start_s,
        prompt_tokens=max(line["prompt_tokens"] - line["cached_prompt_tokens"], 1),
        output_tokens=max(output, 1),
        slo=_slo(line),
        slo_class=line["slo_class"],
    )


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """Return an end with the fields that a replay needs. Raises KeyError or TypeError."""
    names = ("arrival_s", "prompt_tokens", "cached_prompt_tokens", "output_tokens", "max_tokens")
    numbers = {name: line[name] + 0 for name in names}
    texts = {name: str(line[name]) for name in ("outcome", "slo_class")}
    limits = {name: line[name] for name in ("ttft_slo_ms", "tbt_slo_ms", "ttft_ms", "p99_gap_ms")}
    return {**line, **numbers, **texts, **limits}


def _slo(line: dict[str, Any]) -> Slo:
    ttft_ms, tbt_ms = (math.inf if line[name] is None else line[name] for name in ("ttft_slo_ms", "tbt_slo_ms"))
    return Slo(ttft_s=ttft_ms / 1e3, tbt_s=tbt_ms / 1e3)


def _recorded(line: dict[str, Any]) -> Verdict:
    if line["outcome"] == "cancelled":
        return Verdict.CANCELLED
    if line["outcome"] == "refused":
        return Verdict.REFUSED
    if line["outcome"] != "finished":
        return Verdict.LOST
    slo = _slo(line)
    in_time = line["ttft_ms"] is not None and line["ttft_ms"] <= slo.ttft_s * 1e3
    return _judge(in_time, (line["p99_gap_ms"] or 0.0) <= slo.tbt_s * 1e3)


def _judge(in_time: bool, steady: bool) -> Verdict:
    if in_time:
        return Verdict.ATTAINED if steady else Verdict.SLOW
    return Verdict.LATE if steady else Verdict.LATE_AND_SLOW


def _unused(request_id: str, taken: dict[str, Any]) -> str:
    """Return a name for one of several requests that came under the same id."""
    number, name = 1, request_id
    while name in taken:
        number += 1
        name = f"{request_id}#{number}"
    return name


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    counted = Counter(verdicts)
    return {str(kind): counted[kind] for kind in Verdict if counted[kind]}


def _print_table(
    titles: Sequence[str], columns: Sequence[dict[str, int]], changed: Sequence[Change], shown: int
) -> None:
    width = max(map(len, titles)) + 2
    print(f"{'requests':<22}" + "".join(f"{title:>{width}}" for title in titles))
    for kind in Verdict:
        row = [counts.get(kind, 0) for counts in columns]
        if any(row):
            print(f"{kind:<22}" + "".join(f"{count:>{width}}" for count in row))
    better = sum(change.other_policy is Verdict.ATTAINED for change in changed)
    worse = sum(change.same_policy is Verdict.ATTAINED for change in changed)
    print(f"\n{len(changed)} requests end differently: {better} attain only now, {worse} no longer")
    for change in changed[:shown]:
        ttfts = " > ".join("none" if ttft_s is None else f"{ttft_s:.3f} s" for ttft_s in change.ttft_s)
        print(
            f"{change.arrival_s:9.2f} s  {change.request_id:<24} {change.prompt_tokens:>6} + {change.output_tokens:<5}"
            f" {change.same_policy} > {change.other_policy} (TTFT {ttfts}; recorded: {change.recorded})"
        )
    if len(changed) > shown:
        print(f"... and {len(changed) - shown} more (--show, --out)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.replay", description="Decide recorded requests again, under another policy."
    )
    parser.add_argument("logs", type=Path, nargs="+", metavar="DECISION_LOG", help="of the routers of one host")
    parser.add_argument("--policy", required=True, help="system to decide with")
    parser.add_argument("--recorded-policy", default="ascendra", help="system that was recorded (default: %(default)s)")
    parser.add_argument("--instances", type=int, help="default: the workers that the log names")
    parser.add_argument("--hp", type=int, default=-1, help="HP instances of systems with a split (default: theirs)")
    parser.add_argument("--seed", type=int, default=1, help="of the simulated jitter (default: %(default)s)")
    parser.add_argument("--show", type=int, default=20, help="changed requests to print (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for counts and all changes")
    add_cluster_options(parser)
    args = parser.parse_args(argv)
    same_name, other_name = systems_from(args.recorded_policy)[0], systems_from(args.policy)[0]
    with mistakes_in_one_line():
        recording = read_logs(args.logs)
        instances = recording.workers if args.instances is None else args.instances
        if args.instances is None and not instances:
            raise ValueError("the log names no workers; give --instances")
        config = replace(cluster_from(args, instances), seed=args.seed)
        if args.hp >= instances:
            raise ValueError(f"--hp must be below the number of instances, {instances}, got {args.hp}")
    same, other = (replay(recording, _with_hp(system_named(name), args.hp), config) for name in (same_name, other_name))
    compared = [name for name, kind in recording.verdicts.items() if kind is not Verdict.CANCELLED]
    counts = {
        "recorded": _counts(recording.verdicts[name] for name in compared),
        "same_policy": _counts(verdict(same[name]) for name in compared),
        "other_policy": _counts(verdict(other[name]) for name in compared),
    }
    agreement = sum(recording.verdicts[name] is verdict(same[name]) for name in compared) / max(len(compared), 1)
    changed = changes(recording, same, other)
    titles = ["recorded", f"{same_name}, simulated", f"{other_name}, simulated"]
    _print_table(titles, list(counts.values()), changed, args.show)
    print(f"{agreement:.1%} of {len(compared)} requests end as recorded when {same_name} is simulated")
    result = {**provenance(args), "counts": counts, "agreement": agreement, "changes": list(map(asdict, changed))}
    write_result(args.out, result)


def _with_hp(system: System, hp: int) -> System:
    if system.hp_count is None or hp < 0:
        return system
    return replace(system, hp_count=lambda _instances: hp)


if __name__ == "__main__":
    main()
