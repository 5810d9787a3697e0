"""`ascendra generate` and `ascendra chat`."""

import argparse
import json
import sys
import uuid
from dataclasses import asdict

from rich.console import Console

from ascendra.blocking import Client
from ascendra.cli.options import CliError, Commands, add_address, add_request_options, open_client, request_options
from ascendra.errors import AscendraError
from ascendra.types import Finished, Message, Receipt, RequestOptions, Role

_ROLE_NAMES = {Role.LOW: "LP", Role.HIGH: "HP", Role.UNIFIED: "unified"}
_CHAT_HELP = "Ctrl-D or /exit ends, /reset forgets the conversation, Ctrl-C stops an answer"


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    generate = commands.add_parser("generate", help="stream one completion", description="Stream one completion.")
    generate.add_argument("prompt", nargs="?", help="text of the prompt; without it, or with -, read from stdin")
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's message, by the template")
    generate.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    generate.add_argument("--json", action="store_true", help="print one JSON object with text, ids and receipt")
    generate.add_argument("--request-id", metavar="ID", help="id for logs and `ascendra explain` (default: made up)")
    generate.add_argument("--quiet", action="store_true", help="leave out the line about latency on stderr")
    add_request_options(generate)
    add_address(generate)
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk to the model", description=f"Talk to the model. {_CHAT_HELP}.")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    add_request_options(chat)
    add_address(chat)
    chat.set_defaults(run=run_chat)


def run_generate(arguments: argparse.Namespace) -> int:
    """Stream one completion to stdout, and what became of its objective to stderr."""
    prompt: str | None = arguments.prompt
    if prompt in (None, "-"):
        prompt = sys.stdin.read()
    if not prompt:
        raise CliError("the prompt is empty", hint='ascendra generate "Once upon a time"', exit_status=2)
    options = request_options(arguments)
    options["request_id"] = arguments.request_id or uuid.uuid4().hex[:12]
    if arguments.chat or arguments.system:
        options["messages"] = [*_system(arguments.system), Message("user", prompt)]
        prompt = None
    with open_client(arguments) as client:
        if arguments.json:
            print(json.dumps(asdict(client.generate(prompt, **options)), ensure_ascii=False, indent=2))
            return 0
        _, end = print_stream(client, prompt, options)
    if end is not None and not arguments.quiet:
        Console(stderr=True, highlight=False).print(
            receipt_line(end.receipt, options["request_id"]), style="dim", soft_wrap=True
        )
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """Read a line, stream the answer, until the end of input."""
    console = Console(highlight=False)
    conversation = _system(arguments.system)
    options = request_options(arguments)
    options["session_id"] = uuid.uuid4().hex[:12]
    if sys.stdin.isatty():
        console.print(_CHAT_HELP, style="dim")
    with open_client(arguments) as client:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line == "/exit":
                return 0
            if line == "/reset":
                conversation = _system(arguments.system)
            elif line:
                conversation = _answer(client, console, [*conversation, Message("user", line)], options)


def print_stream(client: Client, prompt: str | None, options: RequestOptions) -> tuple[str, Finished | None]:
    """Print a completion as it is generated; returns its text and, unless it was interrupted, its end."""
    texts: list[str] = []
    end: Finished | None = None
    try:
        for chunk in client.stream(prompt, **options):
            texts.append(chunk.text)
            print(chunk.text, end="", flush=True)
            end = chunk.finished
    finally:
        if texts:
            print(flush=True)
    return "".join(texts), end


def receipt_line(receipt: Receipt, request_id: str = "") -> str:
    """Return what was promised and achieved in one line."""
    parts = [f"TTFT {_against(receipt.ttft_ms, receipt.target.ttft_ms)}"]
    if receipt.p99_gap_ms:
        parts.append(f"p99 gap {_against(receipt.p99_gap_ms, receipt.target.tbt_ms)}")
    workers = [attempt.worker_id for attempt in receipt.attempts]
    pool = _ROLE_NAMES.get(receipt.pool, "?") if receipt.pool else "?"
    parts.append(f"{pool} pool" + (f" ({' > '.join(workers)})" if workers else ""))
    if receipt.relegated:
        parts.append("relegated")
    if request_id:
        parts.append(f"id {request_id}")
    return " · ".join(parts)


def _answer(client: Client, console: Console, conversation: list[Message], options: RequestOptions) -> list[Message]:
    """Stream one answer; returns the conversation with it, or without the question when it failed."""
    options = {**options, "messages": conversation}
    try:
        text, end = print_stream(client, None, options)
    except KeyboardInterrupt:
        console.print("(stopped)", style="dim")
        return conversation[:-1]
    except AscendraError as error:
        console.print(f"error: {error}", style="red")
        return conversation[:-1]
    if end is not None:
        console.print(receipt_line(end.receipt), style="dim", soft_wrap=True)
    return [*conversation, Message("assistant", text)]


def _system(text: str | None) -> list[Message]:
    return [Message("system", text)] if text else []


def _against(value_ms: float, target_ms: float | None) -> str:
    shown = f"{value_ms:.0f} ms"
    if target_ms is None:
        return shown
    return f"{shown} ({'within' if value_ms <= target_ms else 'over'} {target_ms:.0f})"
