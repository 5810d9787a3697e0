"""Compile the simulator and the policy code with mypyc, for long studies: the same results, two to three times as fast.

python -m bench.compile && cd .cache/compiled && python -m bench.study --traces DIRECTORY --out ../../bench/results

Needs a C compiler; mypyc comes with mypy. Nothing but long studies uses what it builds.
"""

import shutil
import subprocess
import sys
from pathlib import Path

BUILD = Path(".cache/compiled")
MODULES = (
    *(f"services/policy/{name}.py" for name in ("state", "step_time", "step_fit", "prefill", "token_budget", "order")),
    *(f"services/policy/{name}.py" for name in ("relegation", "value_functions", "elastic_batch", "offload")),
    *(f"services/policy/{name}.py" for name in ("tickets", "placement", "late_binding", "roles", "admission")),
    *(f"bench/simulator/{name}.py" for name in ("request", "engine", "instance", "cluster", "router", "pulling")),
    *(f"bench/{name}.py" for name in ("metrics", "workloads")),
)


def main() -> None:
    """Copy the sources and compile those in which the time goes."""
    shutil.rmtree(BUILD, ignore_errors=True)
    for package in ("bench", "services"):
        shutil.copytree(package, BUILD / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    config = BUILD / "mypy.ini"
    config.write_text("[mypy]\nexplicit_package_bases = true\nignore_missing_imports = true\n", encoding="utf-8")
    mypyc = Path(sys.executable).with_name("mypyc")
    subprocess.run([mypyc, "--config-file", "mypy.ini", *MODULES], cwd=BUILD, check=True)


if __name__ == "__main__":
    main()
