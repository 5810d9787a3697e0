"""The command line, `ascendra COMMAND`: a cluster on this machine, requests, its state and control, and the tools."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from ascendra.cli import certs, control, demo, status, text, tools, up
from ascendra.cli.options import CliError
from ascendra.errors import CONNECTION_LOST, AscendraError, InvalidArgumentError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 after a failure, 2 after wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CliError as error:
        return _fail(str(error), error.hint, error.exit_status)
    except InvalidArgumentError as error:
        return _fail(str(error), "", EXIT_USAGE)
    except AscendraError as error:
        return _fail(str(error), _hint(error), EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left; stdout is pointed elsewhere so that the interpreter's last flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="ascendra", description="LLM serving that keeps TTFT and TBT objectives at the highest load."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (up, demo, text, status, control, certs, tools):
        module.add_commands(commands)
    return parser


def _fail(message: str, hint: str, exit_status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return exit_status


def _hint(error: AscendraError) -> str:
    if error.reason == CONNECTION_LOST:
        return "start a cluster with `ascendra up`, or say where one is with --address or ASCENDRA_ADDRESS"
    if error.retry_after_ms:
        return f"try again in {error.retry_after_ms / 1000:g} s"
    return ""
