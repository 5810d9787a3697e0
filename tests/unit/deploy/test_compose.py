"""The compose files: references, addresses and order agree, and every service accepts its configuration."""

import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from ascendra.cli import main
from services.common.config import resolve, settings
from services.policy.state import Role
from tests.unit.deploy.images import CONFIG_FOLDER, CONFIG_TYPES, ROOT, Image, port_of, read_compose, read_image

CPU = ("compose.yaml",)
GPU = ("compose.yaml", "compose.gpu.yaml")
WORKERS = ("worker-lp", "worker-hp")
OWN_MODEL = {"ASCENDRA_MODEL": "/srv/llama"}
TLS = ("compose.yaml", "compose.tls.yaml")
both = pytest.mark.parametrize("files", [CPU, GPU, TLS], ids=["cpu", "gpu", "tls"])


def image_of(service: dict[str, Any]) -> Image:
    return read_image(ROOT / service["build"]["dockerfile"])


def started_services(compose: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Image]]:
    """Yield the services that run their image's own entry point."""
    for name, service in compose["services"].items():
        if "entrypoint" not in service:
            yield name, service, image_of(service)


def effective_config(service: dict[str, Any]) -> Any:
    """Return the configuration a service would run with: its file under the image's and the service's variables."""
    image = image_of(service)
    command = service.get("command") or ["--config", f"{CONFIG_FOLDER}{image.path.stem}.yaml"]
    file = ROOT / "deploy/config" / command[command.index("--config") + 1].removeprefix(CONFIG_FOLDER)
    environ = {name: str(value) for name, value in (image.environment | service["environment"]).items()}
    return resolve(CONFIG_TYPES[image.module], file=file, environ=environ)


@both
def test_cluster_has_its_parts(files: tuple[str, ...]) -> None:
    """A predictor, a router, a gateway, a worker of each role and the one-shot builder of the model are there."""
    assert set(read_compose(*files)["services"]) == {"model", "predictor", "router", "gateway", *WORKERS}


def test_files_follow_the_compose_specification() -> None:
    """Every file, overlays too, is valid by the schema of the Compose specification."""
    files = sorted((ROOT / "deploy").glob("compose*.yaml"))
    assert len(files) >= 3
    checker = str(Path(sys.executable).with_name("check-jsonschema"))
    command = [checker, "--builtin-schema", "vendor.compose-spec", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@both
def test_images_can_be_built(files: tuple[str, ...]) -> None:
    """Each service names a Dockerfile that exists and the repository root as its context."""
    for service in read_compose(*files)["services"].values():
        assert (ROOT / "deploy" / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


@both
def test_services_accept_their_configuration(files: tuple[str, ...]) -> None:
    """Files and variables resolve with the services' own loader, and no variable is one that nobody reads."""
    for _, service, image in started_services(read_compose(*files)):
        known = {setting.variable for setting in settings(CONFIG_TYPES[image.module])}
        assert set(service["environment"]) <= known
        assert effective_config(service)


@both
def test_roles_engines_and_names(files: tuple[str, ...]) -> None:
    """Each worker has its role, its own id and the engine of its image; router and workers agree on the model."""
    services = read_compose(*files)["services"]
    low, high = (effective_config(services[name]) for name in WORKERS)
    router = effective_config(services["router"])
    assert (low.role, high.role) == (Role.LOW, Role.HIGH)
    assert low.worker_id != high.worker_id
    assert low.engine == high.engine == ("cuda" if files == GPU else "cpu")
    assert low.served_model_name == high.served_model_name == router.model_name
    assert low.model == high.model == router.model


@both
def test_addresses_lead_to_listeners(files: tuple[str, ...]) -> None:
    """Every address that a service is given names a service and the port it listens on."""
    services = read_compose(*files)["services"]
    for _, service, _ in started_services({"services": services}):
        config = effective_config(service)
        peers = [*getattr(config, "workers", ()), *filter(None, [getattr(config, "predictor", "")])]
        peers += getattr(config, "routers", ())
        for peer in peers:
            assert port_of(effective_config(services[peer.partition(":")[0]]).listen) == port_of(peer)
    assert {peer.partition(":")[0] for peer in effective_config(services["router"]).workers} == set(WORKERS)


@both
def test_health_checks_and_published_ports_ask_the_right_port(files: tuple[str, ...]) -> None:
    """The image's health check asks the port that the service listens on here; so does what is published."""
    services = read_compose(*files)["services"]
    for _, service, image in started_services({"services": services}):
        config = effective_config(service)
        assert config.listen == f"0.0.0.0:{image.probed_port}"
        assert not getattr(config, "metrics_listen", config.listen).startswith("127.")
        for published in service.get("ports", ()):
            host, _, inside = published.rpartition(":")
            assert host.startswith("127.0.0.1:")
            assert int(inside) == port_of(config.listen)


@both
def test_start_order_is_possible(files: tuple[str, ...]) -> None:
    """What a service waits for exists, can become so, and is not waiting for it in turn."""
    services = read_compose(*files)["services"]
    graph = {}
    for name, service in services.items():
        graph[name] = set(service.get("depends_on", {}))
        for dependency, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_completed_successfully":
                assert services[dependency]["restart"] == "no"
            else:
                assert wait["condition"] == "service_healthy"
                assert image_of(services[dependency]).final("HEALTHCHECK")
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("model") < order.index("worker-lp") < order.index("router")
    assert order.index("predictor") < order.index("worker-hp") < order.index("router") < order.index("gateway")


@both
@pytest.mark.parametrize("environ", [{}, OWN_MODEL], ids=["demo", "own"])
def test_model_is_where_services_look(files: tuple[str, ...], environ: dict[str, str]) -> None:
    """The demo model's volume, or a folder of the user's, holds the model at the configured path, read-only."""
    compose = read_compose(*files, environ=environ)
    services = compose["services"]
    for name in (*WORKERS, "router"):
        (volume,) = (one for one in services[name]["volumes"] if isinstance(one, str) and ":/models" in one)
        source, target, mode = volume.split(":")
        assert mode == "ro"
        if environ:
            assert (source, target) == ("/srv/llama", services[name]["environment"]["ASCENDRA_MODEL"])
        else:
            assert source in compose["volumes"]
            assert services[name]["environment"]["ASCENDRA_MODEL"] == f"{target}/served"


@pytest.mark.parametrize("environ", [{}, OWN_MODEL], ids=["demo", "own"])
def test_demo_model_is_built_only_when_needed(environ: dict[str, str], tmp_path: Path) -> None:
    """The one-shot service's script builds the demo model exactly when no model was given."""
    model = read_compose(*CPU, environ=environ)["services"]["model"]
    shell, flag, script = model["entrypoint"]
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **model["environment"]}
    done = subprocess.run(
        [shell, flag, script], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == ("" if environ else "-m demo.build_model --out /models/served\n")
    assert model["volumes"] == ["models:/models"]


@both
def test_containers_are_confined(files: tuple[str, ...]) -> None:
    """Root file systems are read-only with a writable /tmp, no capability is kept, and a drain may finish."""
    services = read_compose(*files)["services"]
    for service in services.values():
        assert service["read_only"]
        assert service["tmpfs"][0].startswith("/tmp")
        assert service["cap_drop"] == ["ALL"]
    for _, service, _ in started_services({"services": services}):
        grace_s = float(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > getattr(effective_config(service), "drain_timeout_s", 0)


def test_tls_is_everywhere() -> None:
    """With the overlay every port and every connection is encrypted, with files of the folder that is mounted there."""
    compose = read_compose(*TLS)
    services = compose["services"]
    for name, service, _ in started_services(compose):
        config = effective_config(service)
        assert (config.tls.cert, config.tls.key) == (f"/certs/{name}.crt", f"/certs/{name}.key")
        assert config.tls.ca == "/certs/ca.crt"
        assert config.tls.as_client()
        assert not getattr(config, "insecure", False)
        if name == "gateway":
            assert (config.https_cert, config.https_key) == (config.tls.cert, config.tls.key)
        # A mounted file would stay the old one when it is replaced: only a folder shows what takes its place.
        (mount,) = (volume for volume in service["volumes"] if isinstance(volume, dict))
        assert (mount["type"], mount["source"], mount["target"]) == ("bind", f"./certs/{name}", "/certs")
        assert mount["read_only"]
        assert not mount["bind"]["create_host_path"]
        assert not {"secrets", "configs"} & service.keys()
        assert set(getattr(config.tls, "client_names", ())) <= set(services)
    assert not {"secrets", "configs"} & compose.keys()


def test_tls_commands_make_what_is_mounted(tmp_path: Path) -> None:
    """The commands at the overlay's top make every folder; the keys of services change hands, the client's does not."""
    head = (ROOT / "deploy/compose.tls.yaml").read_text().partition("x-tls:")[0].replace("\\\n#", "")
    commands = [line.removeprefix("#").split() for line in head.splitlines() if line.startswith("#   ")]
    certs, chown, _, status, curl = commands
    assert certs[:4] == ["ascendra", "certs", "--out", "deploy/certs"]
    assert main(["certs", "--out", str(tmp_path), *certs[4:]]) == 0
    services = {name: service for name, service, _ in started_services(read_compose(*TLS))}
    for name in services:
        assert {file.name for file in (tmp_path / name).iterdir()} == {"ca.crt", f"{name}.crt", f"{name}.key"}
    assert chown[:3] == ["sudo", "chown", "10001"]
    assert chown[3].startswith("deploy/certs/{")
    assert chown[3].endswith("}/*.key")
    assert set(chown[3].partition("{")[2].partition("}")[0].split(",")) == set(services)
    for word in (*status, *curl):
        if word.startswith("deploy/certs/"):
            assert (tmp_path / word.removeprefix("deploy/certs/")).is_file()


def test_every_gpu_worker_has_a_gpu() -> None:
    """Each worker reserves one device, by default another one than its neighbour."""
    services = read_compose(*GPU)["services"]
    devices = [services[name]["deploy"]["resources"]["reservations"]["devices"] for name in WORKERS]
    assert all(len(reserved) == 1 and reserved[0]["capabilities"] == ["gpu"] for reserved in devices)
    assert [reserved[0]["device_ids"] for reserved in devices] == [["0"], ["1"]]
