"""What a service does to its process at its start."""

import subprocess
import sys

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
