"""The Helm chart: rendered by helm, checked against Kubernetes' schemas, and for what the parts need of each other."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import REGISTRY

import ascendra
from services.common.config import resolve
from services.policy.state import Role
from services.router import metrics as router_metrics
from tests.unit.deploy.charts import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    Object,
    component_of,
    matches,
    name_of,
    of_kind,
    pod_templates,
    render,
    run_helm,
)
from tests.unit.deploy.images import CONFIG_FOLDER, CONFIG_TYPES, ROOT, port_of, read_image

every_example = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem.removesuffix("-values"))
GPU, MULTI_NODE = (CHART / f"ci/{name}-values.yaml" for name in ("gpu", "multi-node"))
KUBERNETES = ("1.27", "1.37")
"""The oldest version that the chart accepts, and a present one."""
CUSTOM_KINDS = {"PodMonitor", "PrometheusRule", "ScaledObject", "LeaderWorkerSet", "Certificate"}
"""Kinds of operators, which Kubernetes' own schemas do not know."""
SERVICES = {module.removeprefix("services."): config_type for module, config_type in CONFIG_TYPES.items()}


def started(values: Path) -> Iterator[tuple[str, Object, Object, Any]]:
    """Yield (owner, pod template, container, effective configuration) of every service that runs."""
    objects = render(values)
    files = {name_of(found): found["data"] for found in of_kind(objects, "ConfigMap")}
    for owner, template in pod_templates(objects):
        component = component_of(template)
        if component in SERVICES:
            [container] = template["spec"]["containers"]
            [volume] = [v for v in template["spec"]["volumes"] if v["name"] == "config"]
            yield owner, template, container, effective_config(component, container, files[volume["configMap"]["name"]])


def effective_config(component: str, container: Object, files: dict[str, str]) -> Any:
    """Return the configuration that a container would run with: its file under the image's and the pod's variables."""
    [(file, text)] = files.items()
    assert f"{CONFIG_FOLDER}{file}" in " ".join(container.get("args") or container["command"])
    environ = read_image(ROOT / "deploy/docker" / f"{image_name(container)}.Dockerfile").environment
    environ |= {variable["name"]: str(variable.get("value", "from-the-pod")) for variable in container.get("env", [])}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as written:
        written.write(text)
        written.flush()
        return resolve(SERVICES[component], file=Path(written.name), environ=environ)


def image_name(container: Object) -> str:
    """Return the name of a container's image without registry and tag."""
    return str(container["image"]).rpartition("/")[2].partition(":")[0]


def test_linter_is_content() -> None:
    """`helm lint --strict` finds nothing in any example."""
    for values in EXAMPLES:
        done = run_helm("lint", "--strict", str(CHART), "--values", str(values))
        assert done.returncode == 0, done.stdout


@every_example
def test_objects_follow_the_schemas_of_kubernetes(values: Path) -> None:
    """Everything but operators' kinds is valid, unknown fields refused; names are unique and short enough."""
    objects = render(values)
    for found in objects:
        if found["kind"] not in CUSTOM_KINDS:
            for version in KUBERNETES:
                kubernetes_validate.validate(dict(found), version, strict=True)
        assert len(name_of(found)) <= 63
        assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
    assert len({(found["kind"], name_of(found)) for found in objects}) == len(objects)


@every_example
def test_services_accept_their_configuration(values: Path) -> None:
    """Files and variables resolve with the services' own loaders, under the variables of their images."""
    components = {component_of(template) for _, template, _, _ in started(values)}
    assert components == set(SERVICES)
    roles = {config.role for _, template, _, config in started(values) if component_of(template) == "worker"}
    assert roles == {Role.LOW, Role.HIGH}


@every_example
def test_router_and_workers_serve_the_same_model(values: Path) -> None:
    """Router and workers read one folder of one volume and give the model one name."""
    configs = [config for _, template, _, config in started(values) if component_of(template) in ("router", "worker")]
    assert {config.model for config in configs} == {
        yaml.safe_load(values.read_text())["model"].get("path", "/models/served")
    }
    names = {getattr(config, "model_name", None) or config.served_model_name for config in configs}
    assert len(names) == 1
    claims = {
        str(volume)
        for _, template, _, _ in started(values)
        for volume in template["spec"]["volumes"]
        if volume["name"] == "models"
    }
    assert len(claims) == 1


@every_example
def test_addresses_lead_to_listeners(values: Path) -> None:
    """What a service is told to call is a Service, or a pod of one, whose pods listen on that port."""
    objects = render(values)
    for _, _, _, config in started(values):
        peers = [*getattr(config, "routers", ()), getattr(config, "predictor", ""), getattr(config, "worker_dns", "")]
        for peer in filter(None, peers):
            host, port = peer.rsplit(":", 1)
            *pod, service, namespace, svc = host.split(".")
            assert (namespace, svc) == (NAMESPACE, "svc")
            [found] = [s for s in of_kind(objects, "Service") if name_of(s) == service]
            [target] = [p["targetPort"] for p in found["spec"]["ports"] if p["port"] == int(port)]
            listening = [
                {p["name"]: p["containerPort"] for p in container["ports"]}[target]
                for _, template, container, _ in started(values)
                if matches(found["spec"]["selector"], template)
            ]
            assert set(listening) == {int(port)}
            if pod:
                [owner] = [o for o in of_kind(objects, "StatefulSet") if o["spec"]["serviceName"] == service]
                assert found["spec"]["clusterIP"] == "None"
                assert pod[0] in {f"{name_of(owner)}-{i}" for i in range(owner["spec"]["replicas"])}


@every_example
def test_every_router_is_known_to_the_gateways(values: Path) -> None:
    """A gateway lists as many routers as there are."""
    [routers] = [c.routers for _, template, _, c in started(values) if component_of(template) == "gateway"]
    [owner] = [o for o in of_kind(render(values), "StatefulSet") if name_of(o).endswith("-router")]
    assert len(set(routers)) == owner["spec"]["replicas"]


@every_example
def test_ports_and_probes_meet_what_listens(values: Path) -> None:
    """Container ports are those of the configuration, and every probe asks one of them."""
    for _, _, container, config in started(values):
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        listening = {port_of(config.listen), port_of(getattr(config, "metrics_listen", config.listen))}
        assert set(ports.values()) == listening
        assert not config.listen.startswith("127.")
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if "grpc" in probe:
                # Kubernetes' own gRPC probe cannot speak TLS.
                assert probe["grpc"]["port"] == port_of(config.listen)
                assert not config.tls.serves
            else:
                assert ports[probe["httpGet"]["port"]] in listening
                assert probe["httpGet"]["path"] in {"readinessProbe": ["/health"], "livenessProbe": ["/live"]}.get(
                    kind, ["/health", "/live"]
                )
                https = bool(getattr(config, "https_cert", ""))
                assert (probe["httpGet"].get("scheme", "HTTP") == "HTTPS") == https


@every_example
def test_selectors_select_what_they_are_for(values: Path) -> None:
    """Every selector finds pods of its own component only; no two owners share pods."""
    objects = render(values)
    templates = list(pod_templates(objects))
    for found in of_kind(objects, "Service", "PodDisruptionBudget", "PodMonitor", "NetworkPolicy"):
        spec = found["spec"]
        selector = spec["podSelector" if found["kind"] == "NetworkPolicy" else "selector"]
        selector = selector.get("matchLabels", selector)
        selected = [template for _, template in templates if matches(selector, template)]
        assert selected, name_of(found)
        assert {component_of(t) for t in selected} == {found["metadata"]["labels"]["app.kubernetes.io/component"]}
    for found in of_kind(objects, "Deployment", "StatefulSet"):
        selector = found["spec"]["selector"]["matchLabels"]
        assert [owner for owner, template in templates if matches(selector, template)] == [name_of(found)]


@every_example
def test_pods_are_confined(values: Path) -> None:
    """No pod runs as root, keeps a capability or a token, or writes anywhere but to scratch; the Job to the model."""
    for owner, template in pod_templates(render(values)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]
            for mount in container["volumeMounts"]:
                writable = "emptyDir" in volumes[mount["name"]] or component_of(template) == "model"
                assert mount.get("readOnly") or writable, (owner, mount)


@every_example
def test_images_exist(values: Path) -> None:
    """Every image is one of the Dockerfiles', and a worker's is that of its engine."""
    for _, template in pod_templates(render(values)):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            assert (ROOT / "deploy/docker" / f"{image_name(container)}.Dockerfile").is_file()
    for _, template, container, config in started(values):
        if component_of(template) == "worker":
            assert image_name(container) == ("worker-cuda" if config.engine == "cuda" else "worker-cpu")


@every_example
def test_a_drain_may_finish(values: Path) -> None:
    """A pod is killed only after the time to settle and to drain, and its neighbours over Ray live as long."""
    for _, template, _, config in started(values):
        if component_of(template) != "predictor":
            needed_s = config.drain_timeout_s + getattr(config, "settle_s", 0)
            assert template["spec"]["terminationGracePeriodSeconds"] >= needed_s + 10
            assert getattr(config, "settle_s", 5) >= 2
    graces = {
        t["spec"].get("terminationGracePeriodSeconds")
        for _, t in pod_templates(render(values))
        if component_of(t).startswith("worker")
    }
    assert len(graces) == 1


@pytest.mark.parametrize(("values", "gpus", "nodes"), [(GPU, 2, 1), (MULTI_NODE, 8, 2)], ids=["one node", "two nodes"])
def test_workers_have_the_gpus_of_their_model(values: Path, gpus: int, nodes: int) -> None:
    """The GPUs of a worker's pods are those that its engine is told to use, through Ray when they are several."""
    for _, template in pod_templates(render(values)):
        if component_of(template).startswith("worker"):
            [container] = template["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    for _, template, container, config in started(values):
        if component_of(template) == "worker":
            assert config.tensor_parallel_size * config.pipeline_parallel_size == gpus * nodes
            assert config.executor == ("ray" if nodes > 1 else "auto")
            assert ("ray start --head" in " ".join(container.get("command", []))) == (nodes > 1)
    sizes = [found["spec"]["leaderWorkerTemplate"]["size"] for found in of_kind(render(values), "LeaderWorkerSet")]
    assert set(sizes) == ({nodes} if nodes > 1 else set())


def test_only_serving_pods_are_found_by_routers() -> None:
    """The pods that only lend their GPUs are neither in the workers' DNS name nor scraped."""
    objects = render(MULTI_NODE, "podMonitor.enabled=true")
    nodes = [template for _, template in pod_templates(objects) if component_of(template) == "worker-node"]
    assert nodes
    for found in of_kind(objects, "Service", "PodMonitor"):
        selector = found["spec"]["selector"]
        assert not any(matches(selector.get("matchLabels", selector), template) for template in nodes)


@pytest.mark.parametrize("values", [GPU, MULTI_NODE], ids=["one node", "two nodes"])
def test_autoscaling_asks_for_metrics_that_exist(values: Path) -> None:
    """What is scaled exists, leaves its size to the autoscaler, and is scaled on a metric that routers export."""
    objects = render(values)
    exported = {f"{family.name}" for family in REGISTRY.collect()} | {f.name for f in router_metrics.WORKERS.collect()}
    scaled = of_kind(objects, "ScaledObject")
    assert scaled
    for found in scaled:
        target = found["spec"]["scaleTargetRef"]
        [owner] = [o for o in of_kind(objects, target["kind"]) if name_of(o) == target["name"]]
        assert owner["apiVersion"] == target["apiVersion"]
        assert "replicas" not in owner["spec"]
        backlog, kv_usage = (trigger["metadata"] for trigger in found["spec"]["triggers"])
        asked = set(re.findall(r"\bascendra_\w+", backlog["query"]))
        assert "ascendra_router_backlog_seconds" in asked <= exported
        assert ("ascendra_router_held_backlog_seconds" in asked) == (not name_of(found).endswith("-hp"))
        assert f'worker=~"{name_of(found)}-[0-9]+"' in backlog["query"]
        assert "vllm:kv_cache_usage_perc" in kv_usage["query"]
        assert all(float(metadata["threshold"]) > 0 for metadata in (backlog, kv_usage))


def test_certificates_carry_the_names_that_are_asked_for() -> None:
    """Each client finds the name it insists on in its servers' certificates; each server admits its clients' names."""
    names = {
        found["metadata"]["labels"]["app.kubernetes.io/component"]: found["spec"]
        for found in of_kind(render(GPU), "Certificate")
    }
    calls = {("gateway", "router"), ("router", "worker"), ("router", "predictor"), ("worker", "predictor")}
    configs = {component_of(template): config.tls for _, template, _, config in started(GPU)}
    assert set(configs) == set(names) == set(SERVICES)
    for client, server in calls:
        assert configs[client].server_name in names[server]["dnsNames"]
        if configs[server].client_names:
            assert set(configs[server].client_names) & set(names[client]["dnsNames"])
    # A stolen certificate of a gateway or of a client opens neither workers nor the predictor.
    for server in ("worker", "predictor"):
        assert configs[server].client_names
        assert not set(configs[server].client_names) & set(names["gateway"]["dnsNames"])


def test_certificates_are_where_the_services_look() -> None:
    """The Secret that cert-manager fills is mounted in the folder that the configuration names."""
    secrets = {
        found["metadata"]["labels"]["app.kubernetes.io/component"]: found["spec"]["secretName"]
        for found in of_kind(render(GPU), "Certificate")
    }
    for _, template, container, config in started(GPU):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        for file, name in ((config.tls.cert, "tls.crt"), (config.tls.key, "tls.key"), (config.tls.ca, "ca.crt")):
            folder, _, found = file.rpartition("/")
            assert found == name
            assert mounts[folder]["secret"]["secretName"] == secrets[component_of(template)]
        if component_of(template) == "gateway":
            assert mounts[config.https_cert.rpartition("/")[0]]["secret"]["secretName"] == "llm-example-com-tls"
        if component_of(template) in ("gateway", "router"):
            assert mounts[config.api_keys_file.rpartition("/")[0]]["secret"]["secretName"] == "ascendra-keys"


@every_example
def test_plaintext_ports_are_behind_a_network_policy(values: Path) -> None:
    """A service says that its port is open only without TLS, and then the chart restricts who reaches it."""
    policies = {
        p["metadata"]["labels"]["app.kubernetes.io/component"] for p in of_kind(render(values), "NetworkPolicy")
    }
    for _, template, _, config in started(values):
        assert getattr(config, "insecure", not config.tls.serves) == (not config.tls.serves)
        assert component_of(template) in policies


def test_scraped_ports_exist() -> None:
    """Every component's metrics are scraped at a port that its pods name."""
    objects = render(GPU)
    monitors = of_kind(objects, "PodMonitor")
    assert {m["metadata"]["labels"]["app.kubernetes.io/component"] for m in monitors} == set(SERVICES)
    for monitor in monitors:
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        for _, template, container, _ in started(GPU):
            if matches(monitor["spec"]["selector"]["matchLabels"], template):
                assert endpoint["port"] in {port["name"] for port in container["ports"]}
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        # Only the gateway serves its metrics on a port that asks who is there.
        key = endpoint.get("authorization", {}).get("credentials")
        asked = monitor["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
        assert key == ({"name": "ascendra-monitor", "key": "key"} if asked else None)


def test_rules_find_what_is_scraped() -> None:
    """The rules are those of deploy/prometheus, and the jobs they name are the ones that the monitors make."""
    [rules] = of_kind(render(GPU), "PrometheusRule")
    files = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))]
    assert rules["spec"]["groups"] == [group for file in files for group in file["groups"]]
    jobs = {
        relabeling["replacement"]
        for monitor in of_kind(render(GPU), "PodMonitor")
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint["relabelings"]
        if relabeling["targetLabel"] == "job"
    }
    named = set(re.findall(r'job="([^"]+)"', str(rules["spec"]["groups"])))
    assert named
    assert named <= jobs


@every_example
def test_network_policies_let_through_what_is_needed(values: Path) -> None:
    """Routers reach workers, gateways routers, both kinds of reporter the predictor; strangers reach no worker."""
    objects = render(values)
    templates = {component_of(template): template for _, template in pod_templates(objects)}
    policies = {p["metadata"]["labels"]["app.kubernetes.io/component"]: p for p in of_kind(objects, "NetworkPolicy")}

    def allowed(source: Object | None, target: str, port: int) -> bool:
        for rule in policies[target]["spec"]["ingress"]:
            ports = {p["port"] for p in rule.get("ports", [])} or {port}
            peers = rule.get("from")
            selectors = [p.get("podSelector", {}).get("matchLabels", {"none": ""}) for p in peers or []]
            if port in ports and (peers is None or any(source is not None and matches(s, source) for s in selectors)):
                return True
        return False

    assert allowed(templates["router"], "worker", 50061)
    assert allowed(templates["gateway"], "router", 7100)
    assert allowed(templates["router"], "predictor", 7300)
    assert allowed(templates["worker"], "predictor", 7300)
    for target, port in (("worker", 50061), ("predictor", 7300)):
        assert not allowed(None, target, port)
        assert not allowed(templates["gateway"], target, port)
    assert allowed(None, "router", 7100) == (values != GPU)


def test_budgets_keep_all_but_one() -> None:
    """Routers, gateways and each pool give up one pod at a time; the single predictor is in nobody's way."""
    budgets = {
        name_of(b).removeprefix(f"{RELEASE}-ascendra-"): b["spec"]["maxUnavailable"]
        for b in of_kind(render(GPU), "PodDisruptionBudget")
    }
    assert budgets == {"router": 1, "gateway": 1, "lp": 1, "hp": 1}


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("router.replcias=3", "replcias"),
        ("model.name=", "/model/name"),
        ("workers.pools.lp.role=urgent", "/workers/pools/lp/role"),
        ("workers.pools.router.role=low", "router"),
        ("workers.pools.lp.nodes=3", "cannot be spread evenly over 3 nodes"),
        ("workers.defaults.engine=emulated", "only the cuda engine runs on several nodes"),
        ("drainTimeoutSeconds=-1", "drainTimeoutSeconds"),
    ],
)
def test_wrong_values_are_refused_by_name(setting: str, complaint: str) -> None:
    """A typo or an impossible value stops the rendering and is named."""
    done = run_helm("template", RELEASE, str(CHART), "--values", str(MULTI_NODE), "--set", setting)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_chart_is_of_this_version() -> None:
    """The images that the chart asks for by default are this version's."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == ascendra.__version__
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_notes_tell_how_to_reach_it() -> None:
    """What helm prints after an installation names the Services that there are."""
    done = run_helm("install", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(GPU), "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    for service in ("gateway", "router"):
        assert f"svc/{RELEASE}-ascendra-{service}" in notes
    [command] = [line.split() for line in notes.splitlines() if line.startswith("  ascendra status")]
    help_text = subprocess.run(
        [sys.executable, "-m", "ascendra.cli", "status", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert all(part in help_text for part in command if part.startswith("--"))


@pytest.mark.parametrize("prepare", ['echo {} > "$TARGET/config.json"', "exit 3"], ids=["works", "fails"])
def test_a_model_is_complete_or_not_there(prepare: str, tmp_path: Path) -> None:
    """The Job's script leaves a whole model under its name or nothing, and does nothing when the model is there."""
    [job] = of_kind(render(GPU, f"model.prepare={prepare}"), "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    model = tmp_path / "model"
    environ = {"PATH": "/usr/bin:/bin", "MODEL": str(model)}
    ends = [
        subprocess.run(container["command"], env=environ, capture_output=True, timeout=30, check=False).returncode
        for _ in range(2)
    ]
    works = prepare != "exit 3"
    assert [end == 0 for end in ends] == [works, works]
    assert model.exists() == works
    assert not works or [file.name for file in model.iterdir()] == ["config.json"]
