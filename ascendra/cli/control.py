"""`ascendra explain`, `role`, `drain` and `version`."""

import argparse
import json
import platform

import grpc
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

import ascendra
from ascendra import wire
from ascendra.cli.options import Commands, add_address, open_client
from ascendra.cli.text import receipt_line
from ascendra.types import Role
from ascendra.v1 import cluster_pb2


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    explain = commands.add_parser(
        "explain", help="why a request went where it went", description="Print the decisions about a recent request."
    )
    explain.add_argument("request_id", metavar="ID", help="request id, as printed by `ascendra generate`")
    explain.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_address(explain)
    explain.set_defaults(run=run_explain)

    role = commands.add_parser("role", help="change a worker's role", description="Change a worker's role.")
    role.add_argument("worker", metavar="WORKER", help="worker id, as in `ascendra status`")
    role.add_argument(
        "role", choices=[str(role) for role in Role], help="low: throughput; high: latency; unified: one pool"
    )
    add_address(role)
    role.set_defaults(run=run_role)

    drain = commands.add_parser(
        "drain", help="take a worker out of service", description="Stop placing requests on a worker."
    )
    drain.add_argument("worker", metavar="WORKER", help="worker id, as in `ascendra status`")
    drain.add_argument(
        "--timeout-s", type=float, metavar="S", help="cancel what is left after this many seconds (default: its own)"
    )
    add_address(drain)
    drain.set_defaults(run=run_drain)

    version = commands.add_parser("version", help="print versions", description="Print versions.")
    version.set_defaults(run=run_version)


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the decisions about a request."""
    with open_client(arguments) as client:
        response = client.explain(arguments.request_id)
    if arguments.json:
        print(json.dumps(json_format.MessageToDict(response, preserving_proto_field_name=True), indent=2))
        return 0
    console = Console(highlight=False)
    console.print(f"request {response.request_id}: {response.state}", style="bold")
    console.print(_decision_table(response))
    if response.HasField("receipt"):
        console.print(receipt_line(wire.receipt_from_wire(response.receipt)), soft_wrap=True)
    return 0


def run_role(arguments: argparse.Namespace) -> int:
    """Change a worker's role."""
    with open_client(arguments) as client:
        print(f"{arguments.worker}: {client.set_role(arguments.worker, arguments.role)}")
    return 0


def run_drain(arguments: argparse.Namespace) -> int:
    """Drain a worker."""
    with open_client(arguments) as client:
        remaining = client.drain(arguments.worker, timeout_s=arguments.timeout_s)
    print(f"{arguments.worker}: draining, {remaining} request{'' if remaining == 1 else 's'} left")
    return 0


def run_version(arguments: argparse.Namespace) -> int:
    """Print the version of the SDK and of what it stands on."""
    print(f"ascendra {ascendra.__version__}")
    print(f"grpc {grpc.__version__}, Python {platform.python_version()}")
    return 0


def _decision_table(response: cluster_pb2.ExplainResponse) -> Table:
    table = Table("at", "decision", "rule", "worker", "predicted TTFT", "candidates", box=None, pad_edge=False)
    for decision in response.decisions:
        workers = [worker for worker in (decision.from_worker_id, decision.to_worker_id) if worker]
        predicted = f"{decision.predicted_ttft_s * 1000:.0f} ms" if decision.predicted_ttft_s else ""
        candidates = "\n".join(_candidate(candidate) for candidate in decision.candidates)
        table.add_row(
            f"{decision.at_ms:.1f} ms", decision.kind, decision.rule, " > ".join(workers), predicted, candidates
        )
    return table


def _candidate(candidate: cluster_pb2.Candidate) -> str:
    if candidate.excluded:
        return f"{candidate.worker_id}: {candidate.excluded}"
    cached = f", {candidate.cached_tokens} tokens cached" if candidate.cached_tokens else ""
    return f"{candidate.worker_id}: {candidate.predicted_ttft_s * 1000:.0f} ms, miss {candidate.miss_ttft:.0%}{cached}"
