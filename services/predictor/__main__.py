"""`python -m services.predictor [flags]`: the predictor."""

import sys

from services.common.config import load_config
from services.common.lifecycle import run_service
from services.common.logging import configure_logging
from services.predictor.app import run_predictor
from services.predictor.config import PredictorConfig


def main() -> int:
    """Run the predictor; returns the exit status."""
    config = load_config(PredictorConfig, program="python -m services.predictor")
    configure_logging("predictor", level=config.log_level)
    return run_service(lambda stop: run_predictor(config, stop))


if __name__ == "__main__":
    sys.exit(main())
