"""`python -m services.common.health_probe ADDRESS`: ask a server for its health, for container health checks.

Exits with 0 when it is serving, 1 when it is not or cannot be reached; says why on stderr. It finds certificates where
the service does: in ASCENDRA_TLS_CA, _CERT, _KEY and _SERVER_NAME, and ASCENDRA_HTTPS_CERT.
"""

import argparse
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ascendra.errors import InvalidArgumentError
from ascendra.tls import Tls
from services.common.channels import CLIENT_OPTIONS
from services.common.config import ENV_PREFIX


def probe(address: str, *, service: str = "", timeout_s: float = 3.0, tls: Tls | None = None) -> str:
    """Return the health of a service ("" is the whole server), or why it is unknown.

    Args:
        address: host:port or unix:PATH of a gRPC server, or the URL of a health page.
        tls: how to connect to a gRPC server; `ca` alone: what an HTTPS server must show.
    """
    try:
        if address.startswith("http"):
            return _probe_http(address, timeout_s, tls)
        with _open_channel(address, tls) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    except InvalidArgumentError as error:
        return error.message
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    if tls is None or address.startswith("unix:"):
        return grpc.insecure_channel(address, options=CLIENT_OPTIONS)
    return grpc.secure_channel(address, tls.credentials(), options=[*CLIENT_OPTIONS, *tls.options()])


def _probe_http(url: str, timeout_s: float, tls: Tls | None) -> str:
    context = None
    if tls is not None:
        url = url.replace("http:", "https:", 1)
        context = ssl.create_default_context(cafile=tls.ca)
        context.check_hostname = False  # the certificate is for the name that clients use
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        with urllib.request.urlopen(url, timeout=timeout_s, context=context):
            return "SERVING"
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(200).decode(errors='replace').strip()}"
    except OSError as error:
        return str(error)


def _tls_of(address: str, environ: Mapping[str, str]) -> Tls | None:
    """Return the certificates that the service's variables name; None when it listens in plaintext."""
    if address.startswith("http"):
        certificate = environ.get(f"{ENV_PREFIX}HTTPS_CERT")
        return Tls(ca=certificate) if certificate else None
    files = {name: environ.get(f"{ENV_PREFIX}TLS_{name.upper()}", "") for name in ("ca", "cert", "key", "server_name")}
    return Tls(**files) if files["cert"] else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m services.common.health_probe", description="Ask a server for its health."
    )
    parser.add_argument("address", help="host:port or unix:PATH of a gRPC server, or the URL of a health page")
    parser.add_argument("--service", default="", help="full name of a service (default: the whole server)")
    parser.add_argument("--timeout-s", type=float, default=3.0, help="longest wait in seconds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    tls = _tls_of(arguments.address, os.environ)
    health = probe(arguments.address, service=arguments.service, timeout_s=arguments.timeout_s, tls=tls)
    if health != "SERVING":
        sys.stderr.write(f"{arguments.address}: {health}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
