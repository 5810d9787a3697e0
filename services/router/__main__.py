"""`python -m services.router`."""

import asyncio
import os
import sys

from services.common.config import ConfigError, load_config
from services.common.lifecycle import run_service
from services.common.logging import configure_logging
from services.router.config import RouterConfig


def main() -> int:
    """Run a router until SIGTERM; returns the exit status."""
    config = load_config(RouterConfig, program="python -m services.router")
    if not config.model:
        sys.stderr.write("router: --model must name a directory with tokenizer.json\n")
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the encoding threads are the parallelism
    configure_logging("router", level=config.log_level)

    async def serve(stop: asyncio.Event) -> int:
        from services.router.app import Router

        try:
            router = Router(config)
        except (OSError, ValueError, ConfigError) as error:
            sys.stderr.write(f"router: {error}\n")
            return 2
        return await router.run(stop)

    return run_service(serve)


if __name__ == "__main__":
    sys.exit(main())
