"""`python -m services.gateway`: serve the OpenAI protocol in front of the routers."""

import sys

from services.common.config import load_config
from services.common.lifecycle import run_service
from services.common.logging import configure_logging
from services.gateway.app import serve
from services.gateway.config import GatewayConfig


def main() -> int:
    """Run the gateway until SIGTERM or SIGINT; return its exit status."""
    config = load_config(GatewayConfig, program="python -m services.gateway")
    configure_logging("gateway", level=config.log_level)
    return run_service(lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
