"""Compile the simulator and the policy code with mypyc, for long studies: the same results, two to three times as fast.

python -m bench.compile && cd .cache/compiled && python -m bench.study --traces DIRECTORY --out ../../bench/results

Needs a C compiler; mypyc comes with mypy. Nothing but long studies uses what it builds.
"""

import shutil
import subprocess
import sys
from pathlib import Path

BUILD = Path(".cache/compiled")
PACKAGES = ("services/policy", "bench/simulator")
"""Whole ones, for an interpreted class cannot inherit from a compiled one."""
INTERPRETED = ("risk.py",)
"""What mypyc does not take."""
MODULES = ("bench/metrics.py", "bench/workloads.py")


def main() -> None:
    """Copy the sources and compile those in which the time goes."""
    shutil.rmtree(BUILD, ignore_errors=True)
    for package in ("bench", "services"):
        shutil.copytree(package, BUILD / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    config = BUILD / "mypy.ini"
    config.write_text("[mypy]\nexplicit_package_bases = true\nignore_missing_imports = true\n", encoding="utf-8")
    mypyc = Path(sys.executable).with_name("mypyc")
    files = [file for package in PACKAGES for file in sorted((BUILD / package).glob("*.py"))]
    modules = [str(file.relative_to(BUILD)) for file in files if file.name not in INTERPRETED]
    subprocess.run([mypyc, "--config-file", "mypy.ini", *modules, *MODULES], cwd=BUILD, check=True)


if __name__ == "__main__":
    main()
