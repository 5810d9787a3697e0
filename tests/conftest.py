"""What all tests share: how Hypothesis runs, and the tiny model."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.tiny_model import shared_tiny_model

# No time limit by example, for the machine may be busy; and the same examples in every run: what a user runs after a
# clone passes or fails by the code. `HYPOTHESIS_PROFILE=explore make check` looks for others.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Directory of a tiny random Llama with a tokenizer."""
    return shared_tiny_model()
