"""Servers of a test as programs that end with it, also when it is killed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ascendra.cli.tether import tethered

REPOSITORY = Path(__file__).resolve().parents[2]


def start_tethered(command: Sequence[str], log: BinaryIO) -> subprocess.Popen[str]:
    """Start a command in the repository's root; its standard output is a pipe, its errors go to a file."""
    pipe = subprocess.PIPE
    return subprocess.Popen(tethered(command), cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=log, text=True)
