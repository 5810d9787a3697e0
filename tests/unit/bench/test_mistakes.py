"""What a bench command is asked for in vain: one line that says why, and an exit status that is not 0."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import plan, replay, simulate
from bench.live import __main__ as live

TRACE = "input_tokens,output_tokens\n100,2\n200,3\n"
FILES: dict[str, bytes] = {
    "empty.csv": b"",
    "columns.csv": b"a,b\n1,2\n",
    "text.csv": b"input_tokens,output_tokens\nmany,few\n",
    "short.csv": b"input_tokens,output_tokens\n100\n",
    "time.csv": b"t_s,input_tokens,output_tokens\nnan,100,2\n",
    "latin.csv": b"\xe9,input_tokens,output_tokens\n",
    "truncated.csv.gz": gzip.compress(TRACE.encode() * 50, mtime=0)[:-12],
    "broken.csv.gz": b"\x1f\x8b\x08\x00" + b"\xff" * 40,
    "header.csv.gz": b"\x1f\x8bnothing",
    "types.jsonl": b'{"timestamp": 0, "input_length": "x", "output_length": 1}\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a good trace and the bad ones."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.csv").write_text(TRACE)
    return tmp_path


COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "simulate": (simulate.main, ["--rate", "1"]),
    "plan": (plan.main, ["--rate", "1"]),
    "bench": (live.main, ["--rates", "1", "--openai", "http://127.0.0.1:1"]),
}


def mistake(main: Callable[[list[str]], None], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a command ends with."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert capsys.readouterr() == ("", "")
    line = caught.value.code
    assert isinstance(line, str)  # Python prints it to stderr, and the status is 1
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["nosuch", *FILES])
def test_a_trace_that_cannot_be_read_is_named(
    folder: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it."""
    main, arguments = COMMANDS[command]
    assert name in mistake(main, ["--trace", str(folder / name), *arguments], capsys)


@pytest.mark.parametrize(
    ("commands", "arguments", "message"),
    [
        ("simulate plan", "--rate nan", "--rate must be finite"),
        ("simulate plan", "--rate inf", "--rate must be finite"),
        ("simulate plan", "--rate 0", "--rate must be finite and above 0"),
        ("simulate plan", "--requests -1", "at least 1 request"),
        ("simulate plan", "--bias nan", "--bias must be finite"),
        ("simulate plan", "--jitter nan", "--jitter must be finite"),
        ("simulate plan", "--kv-tokens 0", "--kv-tokens must be finite and at least 1"),
        ("simulate plan bench", "--slo nan/100", "finite and above 0"),
        ("simulate plan bench", "--slo 100/inf", "finite and above 0"),
        ("simulate plan bench", "--slo fast", "expected A, B, C"),
        ("simulate plan bench", "--arrivals gamma:nan", "finite and above 0"),
        ("simulate plan bench", "--arrivals trace", "no timestamps"),
        ("simulate plan bench", "--profile nosuch", "nosuch"),
        ("simulate", "--instances 0", "--instances must be finite and at least 1, got 0"),
        ("simulate", "--instances -3", "--instances must be finite and at least 1, got -3"),
        ("plan", "--seeds 0", "--seeds must be"),
        ("plan", "--max-instances 0", "--max-instances must be"),
        ("plan", "--target nan", "--target must be between 0 and 1"),
        ("bench", "--rates 0", "--rates must be finite and above 0"),
        ("bench", "--rates nan", "--rates must be finite and above 0"),
        ("bench", "--seconds nan", "--seconds must be finite"),
        ("bench", "--seconds 1 --warmup-s 500", "after the warm-up"),
        ("bench", "--max-model-len 1", "within --max-model-len"),
        ("bench", "--workers 0", "--workers must be"),
        ("bench", "--vocab-size 3", "--vocab-size must be"),
        ("bench", "--model nosuch", "--model nosuch: not a directory"),
        ("bench", "--openai http://[::1", "--openai http://[::1"),
    ],
)  # fmt: skip
def test_an_option_that_makes_no_sense_is_named(
    folder: Path, commands: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs."""
    for command in commands.split():
        main, usual = COMMANDS[command]
        given = ["--trace", str(folder / "good.csv"), *usual, *arguments.split()]
        assert message in mistake(main, given, capsys)


def test_a_plan_is_asked_for_no_number_of_instances(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It finds that number: the option did nothing."""
    with pytest.raises(SystemExit) as caught:
        plan.main(["--trace", str(folder / "good.csv"), "--rate", "1", "--instances", "0"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --instances" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "arguments", "message"),
    [
        (None, "", "nosuch"),
        ("", "", "no request of the log has ended"),
        ("[]\n", "", "not a line of a decision log"),
        ("\n", "", "not a line of a decision log"),
        ("END", "", "the log names no workers"),
        ("END", "--instances 0", "--instances must be finite and at least 1"),
        ("END", "--instances 2 --hp 2", "--hp must be below the number of instances, 2"),
        ("END", "--instances 2 --bias 0", "--bias must be finite and above 0"),
    ],
)
def test_a_replay_says_what_it_lacks(
    tmp_path: Path, log: str | None, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the log or on the command line."""
    end = {
        "request_id": "a", "at_ms": 900.0, "kind": "end", "outcome": "finished", "arrival_s": 1.0,
        "prompt_tokens": 500, "cached_prompt_tokens": 0, "output_tokens": 20, "max_tokens": 64, "slo_class": "chat",
        "ttft_slo_ms": 600.0, "tbt_slo_ms": 100.0, "ttft_ms": 120.0, "p99_gap_ms": 40.0, "relegated": False,
    }  # fmt: skip
    file = tmp_path / "nosuch"
    if log is not None:
        file.write_text(json.dumps(end) + "\n" if log == "END" else log)
    given = [str(file), "--policy", "ascendra", *arguments.split()]
    assert message in mistake(replay.main, given, capsys)


@contextmanager
def openai_server(status: int, *lines: str) -> Iterator[str]:
    """Answer every request alike; yields the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write("".join(f"{line}\n\n" for line in lines).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def measured(folder: Path, capsys: pytest.CaptureFixture[str], *target: str) -> tuple[Any, str, str]:
    """Run a short bench; return its exit status, stdout and stderr."""
    status: Any = 0
    short = ["--rates", "20", "--seconds", "0.3", "--warmup-s", "0", "--seeds", "1", "--drain-s", "5"]
    try:
        live.main(["--trace", str(folder / "good.csv"), *short, "--out", str(folder / "out.json"), *target])
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("status", "lines", "why"),
    [
        (404, ['{"error": "no model nosuch"}'], '6 failed (first: HTTP 404: b\'{"error": "no model nosuch"}'),
        (429, [], "6 refused (first: 429)"),
        (200, ["data: nonsense"], "6 failed (first: JSONDecodeError"),
        (200, ["data: [DONE]"], "6 failed (first: the answer had no token)"),
    ],
)
def test_a_server_that_serves_nothing_is_no_result(
    folder: Path, status: int, lines: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """How the requests ended is told with the first reason; the status is not 0, and the result file gets nothing."""
    with openai_server(status, *lines) as url:
        ended, out, err = measured(folder, capsys, "--openai", url)
    assert ended == "error: nothing was served in 1 of the runs"
    assert out == ""
    assert why in err
    assert not (folder / "out.json").exists()


def test_a_server_that_serves_is_a_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How the requests ended is told here, too."""
    with openai_server(200, 'data: {"choices": [{}]}', "data: [DONE]") as url:
        ended, out, err = measured(folder, capsys, "--openai", url)
    assert ended == 0
    assert "| 20 | openai |" in out
    assert "6 finished;" in err
    assert len(json.loads((folder / "out.json").read_text())["results"]) == 1


def test_a_closed_port_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A router that cannot be asked ends the bench; another server's requests say what they met."""
    with socket.socket() as held:  # bound and not listening: nobody else gets it, and it refuses connections
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        ended, out, err = measured(folder, capsys, "--address", address)
        assert (out, err) == ("", "")
        assert ended.startswith("error: ")
        assert address in ended
        assert "\n" not in ended
        ended, _, err = measured(folder, capsys, "--openai", f"http://{address}/v1")
    assert ended == "error: nothing was served in 1 of the runs"
    assert "6 failed (first: ConnectError: " in err
