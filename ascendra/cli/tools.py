"""`ascendra bench`, `simulate`, `plan`, `replay` and `profile`: the checkout's tools, with their own flags."""

import argparse
import os
import sys
from dataclasses import dataclass

from ascendra.cli.cluster import checkout
from ascendra.cli.options import Commands


@dataclass(frozen=True, slots=True)
class Tool:
    """A program of the checkout."""

    module: str
    help: str


TOOLS = {
    "bench": Tool("bench.live", "measure systems with real engines"),
    "simulate": Tool("bench.simulate", "simulate one run of a policy on a workload"),
    "plan": Tool("bench.plan", "how many instances a workload needs"),
    "replay": Tool("bench.replay", "decide recorded requests again, under another policy"),
    "profile": Tool("services.worker.profile", "measure an engine's step times and write a model file"),
}
_NO_FLAG = "\0"


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    for verb, tool in TOOLS.items():
        # With no prefix that marks a flag, every argument, --help among them, is the tool's.
        parser = commands.add_parser(verb, help=tool.help, add_help=False, prefix_chars=_NO_FLAG)
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.set_defaults(run=run_tool, tool=tool)


def run_tool(arguments: argparse.Namespace) -> int:
    """Become the tool: signals and exit status are its own. Raises CliError outside a checkout."""
    paths = [str(checkout()), *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    os.execve(
        sys.executable,
        [sys.executable, "-m", arguments.tool.module, *arguments.arguments],
        {**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
