"""Arguments that several commands share."""

import argparse
import os
from pathlib import Path
from typing import TypeAlias

from ascendra.blocking import Client
from ascendra.tls import Tls
from ascendra.types import RequestOptions, SamplingParams, Slo

ADDRESS_VARIABLE = "ASCENDRA_ADDRESS"
API_KEY_VARIABLE = "ASCENDRA_API_KEY"
DEFAULT_ADDRESS = "127.0.0.1:7100"
_TLS_FILES = {
    "ca": "authorities that may have signed the router's certificate; connect with TLS",
    "cert": "certificate to show",
    "key": "private key of the certificate",
    "server-name": "name that the router's certificate must carry, where it is not the host of the address",
}

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class CliError(Exception):
    """A command failed; the message is for the user."""

    def __init__(self, message: str, *, hint: str = "", exit_status: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_status = exit_status


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the router's address and what it takes to talk to it."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS,
        help=f"router, or several with commas between (default: %(default)s) [{ADDRESS_VARIABLE}]",
    )

    for name, what in _TLS_FILES.items():
        parser.add_argument(
            f"--tls-{name}",
            metavar="NAME" if name == "server-name" else "FILE",
            default=os.environ.get(_tls_variable(name), ""),
            help=f"{what} [{_tls_variable(name)}]",
        )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"file with the API key to send (default: the key in {API_KEY_VARIABLE}, if set)",
    )


def open_client(arguments: argparse.Namespace) -> Client:
    """Return a client of the routers that were named. Raises CliError."""
    addresses = [part.strip() for part in arguments.address.split(",") if part.strip()]
    if not addresses:
        raise CliError("--address: expected HOST:PORT", exit_status=2)
    files = {name.replace("-", "_"): getattr(arguments, f"tls_{name.replace('-', '_')}") for name in _TLS_FILES}
    tls = Tls(**files) if any(files.values()) else None
    return Client(addresses, credentials=tls, api_key=_api_key(arguments.api_key_file))


def _api_key(file: str | None) -> str:
    if not file:
        return os.environ.get(API_KEY_VARIABLE, "")
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CliError(f"--api-key-file: {file}: {error.strerror}", exit_status=2) from error


def _tls_variable(name: str) -> str:
    return f"ASCENDRA_TLS_{name.upper().replace('-', '_')}"


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add sampling and objectives."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N", default=256, help="most tokens (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the server's)")
    sampling.add_argument("--top-p", type=float, metavar="X", help="nucleus mass, above 0 and at most 1")
    sampling.add_argument("--top-k", type=int, metavar="N", help="keep the N likeliest tokens; 0 keeps all")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    objective = parser.add_argument_group("objective")
    objective.add_argument("--ttft-ms", type=float, metavar="MS", help="time to first token, in milliseconds")
    objective.add_argument("--tbt-ms", type=float, metavar="MS", help="time between tokens, in milliseconds")
    objective.add_argument("--slo-class", metavar="NAME", help="class of the router's configuration")
    objective.add_argument(
        "--on-overload",
        choices=("relegate", "refuse"),
        help="when nobody can make the objective: serve it behind the others, or refuse it at once",
    )
    request = parser.add_argument_group("request")
    request.add_argument("--model", metavar="NAME", help="not needed where one model is served")
    request.add_argument("--timeout-s", type=float, metavar="S", help="limit on the whole request, in seconds")


def request_options(arguments: argparse.Namespace) -> RequestOptions:
    """Return the options that `add_request_options` read."""
    options: RequestOptions = {
        "sampling": SamplingParams(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
            stop=arguments.stop or (),
        ),
        "slo": Slo(ttft_ms=arguments.ttft_ms, tbt_ms=arguments.tbt_ms),
    }
    if arguments.slo_class:
        options["slo_class"] = arguments.slo_class
    if arguments.on_overload:
        options["on_overload"] = arguments.on_overload
    if arguments.model:
        options["model"] = arguments.model
    if arguments.timeout_s is not None:
        options["timeout_s"] = arguments.timeout_s
    return options
