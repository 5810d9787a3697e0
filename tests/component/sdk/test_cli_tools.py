"""`ascendra status` into a pipe, and the commands that stand for the checkout's tools, as processes."""

import signal
import subprocess
import sys

import pytest

from ascendra.cli.tools import TOOLS
from tests.support.scripted_router import ScriptedRouter

pytestmark = pytest.mark.timeout(120)


def test_a_live_status_goes_to_a_pipe_picture_by_picture(router_in_a_thread: ScriptedRouter) -> None:
    """Without a terminal the pictures follow each other, and Ctrl-C ends them."""
    arguments = ["status", "--interval-s", "0.05", "--address", router_in_a_thread.address]
    process = subprocess.Popen(_ascendra(*arguments), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pictures = 0
        for line in process.stdout:
            pictures += line.startswith("router ")
            if pictures == 3:
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("verb", TOOLS)
def test_a_verb_shows_the_help_of_its_tool(verb: str) -> None:
    """Flags, --help among them, reach the tool, whose exit status is the command's."""
    shown = subprocess.run(_ascendra(verb, "--help"), capture_output=True, text=True, check=True)
    assert f"usage: python -m {TOOLS[verb].module}" in shown.stdout
    assert subprocess.run(_ascendra(verb, "--no-such-flag"), capture_output=True, check=False).returncode == 2


def _ascendra(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ascendra.cli", *arguments]
