"""`ascendra status`: the cluster as a table, once or live."""

import argparse
import contextlib
import json
from typing import Any

from google.protobuf import json_format
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ascendra import wire
from ascendra.cli.options import Commands, add_address, open_client
from ascendra.types import Role
from ascendra.v1 import cluster_pb2

_HEALTH: dict[int, tuple[str, str]] = {
    cluster_pb2.WORKER_HEALTH_READY: ("ready", "green"),
    cluster_pb2.WORKER_HEALTH_CONNECTING: ("connecting", "yellow"),
    cluster_pb2.WORKER_HEALTH_TRIPPED: ("tripped", "red"),
    cluster_pb2.WORKER_HEALTH_DRAINING: ("draining", "yellow"),
}
_WIDE = 110
_POOLS = {Role.LOW: "LP", Role.HIGH: "HP", Role.UNIFIED: "unified"}


def add_commands(commands: Commands) -> None:
    """Add the command of this module."""
    status = commands.add_parser(
        "status", help="workers, queues and attainment", description="Show the cluster; live until Ctrl-C."
    )
    status.add_argument("--once", action="store_true", help="print it once and exit")
    status.add_argument("--json", action="store_true", help="print JSON; without --once, one line each interval")
    status.add_argument(
        "--interval-s", type=float, metavar="S", default=1.0, help="seconds between two pictures (default: %(default)s)"
    )
    add_address(status)
    status.set_defaults(run=run_status)


def run_status(arguments: argparse.Namespace) -> int:
    """Print the cluster once, or again and again until Ctrl-C."""
    console = Console(highlight=False)
    with open_client(arguments) as client:
        if arguments.once:
            status = client.status()
            if arguments.json:
                print(json.dumps(as_dict(status), indent=2))
            else:
                console.print(render(status, console.width))
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            if arguments.json:
                for status in client.watch_status(arguments.interval_s):
                    print(json.dumps(as_dict(status)), flush=True)
            elif console.is_terminal:
                with Live(auto_refresh=False, console=console) as live:
                    for status in client.watch_status(arguments.interval_s):
                        live.update(render(status, console.width), refresh=True)
            else:  # a file or pipe keeps every picture, where Live would keep the last
                for status in client.watch_status(arguments.interval_s):
                    console.print(render(status, console.width), Text())
    return 0


def as_dict(status: cluster_pb2.GetStatusResponse) -> dict[str, Any]:
    """Return the status as JSON-ready data, in protobuf's JSON form with the field names of the proto."""
    return json_format.MessageToDict(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def render(status: cluster_pb2.GetStatusResponse, width: int) -> Group:
    """Return the status as tables; a narrow terminal, of `width` characters, is spared engine and policy."""
    predictor = "connected" if status.predictor_connected else "not connected"
    held = f" ({status.held_requests} held until a worker has room)" if status.held_requests else ""
    head = Text(
        f"router {status.router_id} {status.version} · up {_duration(status.uptime_s)} · "
        f"{status.live_requests} live requests{held} · predictions by {status.prediction_policy or '?'}, "
        f"predictor {predictor}"
    )
    parts: list[Text | Table] = [head, Text(), _workers(status, wide=width >= _WIDE)]
    if status.attainment:
        parts += [Text(), _attainment(status)]
    if counters := {name: count for name, count in sorted(status.counters.items()) if count}:
        parts += [Text(), Text(" · ".join(f"{name} {count}" for name, count in counters.items()), style="dim")]
    return Group(*parts)


def _workers(status: cluster_pb2.GetStatusResponse, *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("worker", "pool", "health"):
        table.add_column(name, no_wrap=True)
    for name in ("waiting", "running", "to prefill", "KV", "TTFT", "tok/s"):
        table.add_column(name, justify="right")
    if wide:
        table.add_column("engine", no_wrap=True)
        table.add_column("policy", no_wrap=True)
    for worker in status.workers:
        health, style = _HEALTH.get(worker.health, ("?", "red"))
        role = wire.role_from_wire(worker.role)
        table.add_row(
            worker.worker_id or worker.address.rpartition("/")[2],
            _POOLS[role] if role else "?",
            Text(health, style=style),
            str(worker.waiting),
            str(worker.running),
            str(worker.queued_prefill_tokens),
            f"{worker.kv_usage:.0%}",
            f"{worker.predicted_ttft_s * 1000:.0f} ms" if worker.predicted_ttft_s else "",
            f"{worker.tokens_per_s:.0f}",
            *((worker.engine, worker.policy) if wide else ()),
        )
    return table


def _attainment(status: cluster_pb2.GetStatusResponse) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"class, last {status.window_s:.0f} s", no_wrap=True)
    for name in ("requests", "met", "TTFT met", "TBT met", "TTFT p50", "p99", "gap p99"):
        table.add_column(name, justify="right")
    for row in status.attainment:
        table.add_row(
            row.slo_class,
            str(row.requests),
            f"{row.joint:.1%}",
            f"{row.ttft:.1%}",
            f"{row.tbt:.1%}",
            *(f"{seconds * 1000:.0f} ms" for seconds in (row.ttft_p50_s, row.ttft_p99_s, row.gap_p99_s)),
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
