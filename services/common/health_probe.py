"""`python -m services.common.health_probe ADDRESS`: ask a server for its health, for container health checks.

Exits with 0 when it is serving, 1 when it is not or cannot be reached; says why on stderr.
"""

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channels import CLIENT_OPTIONS


def probe(address: str, *, service: str = "", timeout_s: float = 3.0) -> str:
    """Return the health of a service ("" is the whole server), or why it is unknown.

    Args:
        address: host:port or unix:PATH of a gRPC server, or the URL of a health page.
    """
    if address.startswith("http"):
        return _probe_http(address, timeout_s)
    with grpc.insecure_channel(address, options=CLIENT_OPTIONS) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _probe_http(url: str, timeout_s: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s):
            return "SERVING"
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(200).decode(errors='replace').strip()}"
    except OSError as error:
        return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m services.common.health_probe", description="Ask a server for its health."
    )
    parser.add_argument("address", help="host:port or unix:PATH of a gRPC server, or the URL of a health page")
    parser.add_argument("--service", default="", help="full name of a service (default: the whole server)")
    parser.add_argument("--timeout-s", type=float, default=3.0, help="longest wait in seconds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    health = probe(arguments.address, service=arguments.service, timeout_s=arguments.timeout_s)
    if health != "SERVING":
        sys.stderr.write(f"{arguments.address}: {health}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
