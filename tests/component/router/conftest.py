"""What the router's component tests share."""

from pathlib import Path

import pytest

from tests.support.tokenizer_files import write_byte_level


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer, without weights."""
    return write_byte_level(tmp_path_factory.mktemp("tokenizer") / "tiny")
