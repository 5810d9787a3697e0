"""`python -m services.worker --config FILE [flags]`: one worker."""

import sys

from services.common.config import load_config
from services.common.lifecycle import run_service
from services.common.logging import configure_logging
from services.worker.config import WorkerConfig
from services.worker.engine.environment import prepare_environment


def main() -> int:
    """Run one worker; returns the exit status."""
    config = load_config(WorkerConfig, program="python -m services.worker")
    configure_logging("worker", level=config.log_level)
    prepare_environment(config.engine, config.cpu_threads)
    from services.worker.app import run_worker

    return run_service(lambda stop: run_worker(config, stop))


if __name__ == "__main__":
    sys.exit(main())
