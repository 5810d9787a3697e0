"""Gateway and router with a scripted worker in one loop, and schemathesis against them.

`python -m tests.support.api_under_test --examples 500 --seconds 900` is the long run.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from services.common.access import Access
from services.common.logging import configure_logging
from services.gateway.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.http_server import start_http_server
from tests.support.local_router import LocalRouter, cluster
from tests.support.scripted_worker import ScriptedWorker
from tests.support.tokenizer_files import write_byte_level

MAX_MODEL_LEN = 96
"""Short, so that a request that asks for two thousand million tokens ends soon."""
_REQUEST_TIMEOUT_S = 20


@contextlib.asynccontextmanager
async def api_under_test(directory: Path) -> AsyncIterator[tuple[str, Gateway, LocalRouter]]:
    """Serve, and yield the URL and what may be looked into."""
    worker = ScriptedWorker(max_model_len=MAX_MODEL_LEN)
    worker.step_s = 0.0005
    async with cluster(write_byte_level(directory), worker, default_max_tokens=8) as router:
        gateway = Gateway(GatewayConfig(routers=(router.router.address,)), Access())
        server = await start_http_server("127.0.0.1:0", build_app(gateway))
        try:
            yield f"http://{server.address}", gateway, router
        finally:
            await server.stop()
            await gateway.close()


async def run_schemathesis(
    url: str, *, examples: int, seconds: int, seed: int, phases: str = "examples,coverage,fuzzing"
) -> tuple[int, str]:
    """Run it against the document that the gateway serves; return exit status and output.

    A time limit on each request makes a hang a failure. What is left out: whether bodies that the document allows are
    accepted, as the router's own limits and the prompt's length have a say in that.
    """
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    checks += ",negative_data_rejection,unsupported_method"
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *("--checks", checks, "--max-examples", str(examples), "--max-time", str(seconds), "--seed", str(seed)),
            *("--phases", phases, "--request-timeout", str(_REQUEST_TIMEOUT_S)),
            *("--suppress-health-check", "all", "--no-color", "--continue-on-failure"),
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


async def _long_run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        async with api_under_test(Path(folder) / "tiny") as (url, gateway, router):
            status, output = await run_schemathesis(
                url, examples=arguments.examples, seconds=arguments.seconds, seed=arguments.seed
            )
            print(output)
            print(f"left over: {gateway.in_flight} in the gateway, {len(router.router.dispatcher.live)} in the router")
    return status


def main() -> None:
    """Run it for longer than a test may take."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.api_under_test", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="of each operation")
    parser.add_argument("--seconds", type=int, default=900)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    configure_logging("api_under_test", level="error")
    sys.exit(asyncio.run(_long_run(arguments)))


if __name__ == "__main__":
    main()
