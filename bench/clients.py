"""python -m bench.clients: load tools that know nothing of Ascendra, against the gateway on real vLLM on the CPU.

Starts a worker, a router and a gateway, then runs `vllm bench serve` and, where it is given, AIPerf from an environment
of its own (its dependencies do not fit beside vLLM's):

    python -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf==0.13.0
    python -m bench.clients --aiperf /tmp/aiperf/bin/aiperf

What each printed and what it measured goes to bench/results/clients. Exits with 1 when a tool fails or sees an error.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.parity.servers import MODEL_NAME, ascendra_server, vllm_environment
from bench.result_files import write_result

TTFT_MS, TPOT_MS = 2000, 200
TOOL_TIMEOUT_S = 400.0
_NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LOG = re.compile(r"\b(INFO|NOTICE|WARNING|DEBUG)\b|^Namespace\(|^W\d{4} ")
"""Lines of a tool that are about itself and the machine."""
_KEPT = (
    *("completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("request_goodput", "output_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms"),
    *("median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "median_e2el_ms", "p99_e2el_ms"),
)
"""Figures of `vllm bench serve` that are kept; the others name paths and times of the machine."""


def vllm_bench(arguments: argparse.Namespace, url: str, folder: Path) -> list[str]:
    """Return the command of `vllm bench serve`, with goodput and our objectives as headers."""
    return [
        *(str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai", "--base-url", url),
        *("--endpoint", "/v1/completions", "--model", MODEL_NAME, "--tokenizer", str(arguments.model)),
        *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "24", "--ignore-eos"),
        *("--num-prompts", str(arguments.requests), "--request-rate", str(arguments.rate), "--temperature", "0"),
        *("--goodput", f"ttft:{TTFT_MS}", f"tpot:{TPOT_MS}", "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--header", f"x-slo-ttft-ms={TTFT_MS}", f"x-slo-tpot-ms={TPOT_MS}", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "vllm-bench.json"),
    ]


def aiperf(arguments: argparse.Namespace, url: str, folder: Path) -> list[str]:
    """Return the command of AIPerf, with goodput and our objectives in the body."""
    extra = {"ignore_eos": True, "slo": {"ttft_ms": TTFT_MS, "tbt_ms": TPOT_MS}}
    return [
        *(str(arguments.aiperf), "profile", "--model", MODEL_NAME, "--url", url, "--endpoint-type", "completions"),
        *("--streaming", "--tokenizer", str(arguments.model.absolute()), "--concurrency", "4"),
        *("--request-count", str(arguments.requests), "--synthetic-input-tokens-mean", "64"),
        *("--output-tokens-mean", "24", "--extra-inputs", json.dumps(extra), "--use-server-token-count"),
        *("--goodput", f"time_to_first_token:{TTFT_MS} inter_token_latency:{TPOT_MS}"),
        *("--artifact-dir", str(folder), "--ui", "none"),
    ]


async def run_tool(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a load tool; return its status and what it printed, without colours."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), TOOL_TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, _NOISE.sub("", output.decode(errors="replace"))


async def run(arguments: argparse.Namespace, out: Path) -> list[str]:
    """Run the tools one after the other; return what went wrong."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="ascendra-clients-") as scratch:
        folder = Path(scratch)
        environment = vllm_environment(folder)
        async with ascendra_server(arguments.model) as url:
            status, output = await run_tool(vllm_bench(arguments, url, folder), environment)
            figures = _vllm_figures(folder / "vllm-bench.json")
            _write(out / "vllm-bench-serve.txt", output, (url, folder, arguments))
            write_result(out / "vllm-bench-serve.json", figures)
            if status or figures.get("failed") or figures.get("completed") != arguments.requests:
                wrong.append(f"vllm bench serve: status {status}, {figures}")
            if arguments.aiperf is not None:
                status, output = await run_tool(aiperf(arguments, url, folder), {})
                figures = _aiperf_figures(folder)
                _write(out / "aiperf.txt", output, (url, folder, arguments))
                write_result(out / "aiperf.json", figures)
                if status or figures.get("request_count", {}).get("avg") != arguments.requests:
                    wrong.append(f"aiperf: status {status}, {figures.get('request_count')}")
    return wrong


def _vllm_figures(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    return {name: found[name] for name in _KEPT if name in found}


def _aiperf_figures(folder: Path) -> dict[str, Any]:
    files = sorted(folder.rglob("profile_export_aiperf.json"))
    if not files:
        return {}
    found = json.loads(files[-1].read_text())
    return {name: value for name, value in found.items() if isinstance(value, dict) and "avg" in value}


def _write(file: Path, text: str, places: tuple[str, Path, argparse.Namespace]) -> None:
    """Write what a tool printed, without the folders of this machine."""
    url, folder, arguments = places
    for place, name in (
        (url, "http://GATEWAY"),
        (str(folder), "FOLDER"),
        (str(arguments.model.absolute()), "MODEL"),
        (str(Path.cwd()), "."),
        (str(Path(arguments.aiperf).parent) if arguments.aiperf else "\0", "BIN"),
    ):
        text = text.replace(place, name)
    lines = [line.rstrip() for line in text.splitlines() if not _LOG.search(line)]
    file.write_text("\n".join(lines).strip() + "\n")


def main() -> None:
    """Run the tools and say what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo-model"), help="model directory (see demo/)")
    parser.add_argument("--requests", type=int, default=60, help="of each tool")
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second of vllm bench serve")
    parser.add_argument("--aiperf", type=Path, help="the program of AIPerf; absent: it is not run")
    parser.add_argument("--out", type=Path, default=Path("bench/results/clients"))
    arguments = parser.parse_args()
    if arguments.aiperf is not None and shutil.which(arguments.aiperf) is None:
        sys.exit(f"error: no program {arguments.aiperf}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    wrong = asyncio.run(run(arguments, arguments.out))
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
