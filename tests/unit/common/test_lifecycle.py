"""What a service does to its process at its start."""

import asyncio
import subprocess
import sys

import pytest

from services.common.lifecycle import run_service
from services.common.listening import CannotListen

PROGRAM = """
import resource
from services.common.lifecycle import allow_open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, min(hard, 512)))
allow_open_files(1 << 16)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_open_files_are_raised_to_what_is_allowed() -> None:
    """A soft limit that is made for a shell does not bound the number of streams."""
    shown = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "512"


def test_an_address_that_cannot_be_had_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A log line says which, and why."""

    async def main(stop: asyncio.Event) -> int:
        raise CannotListen("127.0.0.1:80: Permission denied")

    assert run_service(main) == 2
    assert "127.0.0.1:80: Permission denied" in capsys.readouterr().out
