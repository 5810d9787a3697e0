"""Prometheus rules, Grafana's dashboard and their compose overlay ask only for what the services export."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.policy.quotas import Limit
from services.router.metrics import REASONS
from tests.support.promql import label_names, metric_names
from tests.unit.deploy.images import ROOT, port_of, read_compose
from tests.unit.deploy.test_compose import effective_config
from tests.unit.docs.test_links import anchors
from tools.reference.metrics import SERVICES, metrics_of

PROMETHEUS, GRAFANA = ROOT / "deploy/prometheus", ROOT / "deploy/grafana"
OVERLAY = ("compose.yaml", "compose.observability.yaml")
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
GROUPS = [group for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"]]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((GRAFANA / "dashboards/ascendra.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
_PROMETHEUS_OWN = {"up", "ALERTS", "process_cpu_seconds_total", "process_resident_memory_bytes"}
_TARGET_LABELS = {"job", "instance", "le", "alertstate", "alertname"}


def vllm_names() -> set[str]:
    """Return the names in vLLM's source; importing it takes ten seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()
    names = set(re.findall(r'name="(vllm:\w+)"', text))
    assert len(names) > 20
    return names | {f"{name}{suffix}" for name in names for suffix in ("_total", "_bucket", "_sum", "_count")}


def exported() -> dict[str, set[str]]:
    """Return the labels of every sample by name."""
    found: dict[str, set[str]] = {name: {"model_name", "engine"} for name in vllm_names()}
    for service in SERVICES:
        for entry in metrics_of(service):
            for sample in entry.samples:
                found.setdefault(sample, set()).update(entry.labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, expression) of rules, panels, variables and annotations."""
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["name"], re.sub(r", \w+\)$", ")", variable["query"]["query"])
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


@pytest.mark.parametrize(
    ("expression", "names", "labels"),
    [
        ('sum by (a, le) (rate(x_total{b=~"c|up",d!="y_z"}[5m])) > 0.5', {"x_total"}, {"a", "le", "b", "d"}),
        ("r:x:rate5m / on (a) group_left () y and z > 14.4 * 0.01", {"r:x:rate5m", "y", "z"}, {"a"}),
        ('rate(x{a="$b"}[$__rate_interval])', {"x"}, {"a"}),
    ],
)
def test_names_are_found_in_expressions(expression: str, names: set[str], labels: set[str]) -> None:
    """The finder of names is right itself."""
    assert metric_names(expression) == names
    assert label_names(expression) == labels


def test_every_metric_in_rules_and_dashboard_exists() -> None:
    """With the labels that are matched and grouped by, too."""
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    known = exported()
    asked = set()
    for where, expression in expressions():
        names = metric_names(expression)
        assert names, where
        unknown = names - known.keys() - recorded - _PROMETHEUS_OWN
        assert not unknown, f"{where}: {unknown}"
        if names <= known.keys():
            missing = label_names(expression) - _TARGET_LABELS - set().union(*(known[name] for name in names))
            assert not missing, f"{where}: {missing}"
        asked |= names
    assert recorded <= asked, "a recorded series that nobody reads"


def test_refusals_that_count_are_those_for_lack_of_capacity() -> None:
    """Each reason in the rule is one that exists and that its alert's runbook names; no quota is among them."""
    (rule,) = (rule for rule in RULES if rule.get("record") == "ascendra:refusals:ratio_rate5m")
    matched = re.search(r'reason=~"([^"]+)"', rule["expr"])
    assert matched
    reasons = set(matched[1].split("|"))
    assert reasons <= REASONS - {limit.value.lower() for limit in Limit}
    _, _, after = (ROOT / "docs/operations.md").read_text().partition("### AscendraRefusesRequests\n")
    runbook, _, _ = after.partition("\n### ")
    assert reasons == set(re.findall(r"`(\w+)`", runbook)) - {"ascendra_router_refusals_total"}


def test_alerts_are_documented() -> None:
    """Each has a severity, a summary, and a heading in the operations guide that its runbook link leads to."""
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names) > 10
    headings = anchors(ROOT / "docs/operations.md")
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/operations.md"
        assert anchor == rule["alert"].lower()
        assert anchor in headings
    documented = {name for name in headings if name.startswith("ascendra")}
    assert documented == {name.lower() for name in names}


def test_labels_in_summaries_are_those_of_the_expression() -> None:
    """A summary that names a label which the expression drops would show nothing."""
    known = exported()
    for rule in ALERTS:
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        own = set().union(*(known.get(name, set()) for name in metric_names(rule["expr"])))
        assert shown <= own | label_names(rule["expr"]) | _TARGET_LABELS | {"slo_class"}, rule["alert"]


def test_dashboard_is_whole() -> None:
    """Ids are unique, panels do not overlap, all ask the provisioned data source, and use only defined variables."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in mine) < 24
        assert not mine & cells
        cells |= mine
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    uids = {source["uid"] for source in provisioned}
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    for panel in PANELS:
        assert panel["datasource"]["uid"] in uids
        for target in panel["targets"]:
            assert target["datasource"]["uid"] in uids
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables


def test_overlay_leads_to_files_and_services() -> None:
    """What is mounted exists, the scraped ports are those the services listen on, and spans go to a collector."""
    services = read_compose(*OVERLAY)["services"]
    for name in ("prometheus", "grafana"):
        for source, _, mode in (volume.split(":") for volume in services[name]["volumes"] if volume.startswith("./")):
            assert (ROOT / "deploy" / source).is_dir()
            assert mode == "ro"
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/ascendra.yml").read_text())["providers"][0]
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    scraped: dict[str, int] = {}
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        for static in job.get("static_configs", ()):
            scraped |= {target.partition(":")[0]: port_of(target) for target in static["targets"]}
        for dns in job.get("dns_sd_configs", ()):
            scraped |= dict.fromkeys(dns["names"], dns["port"])
    assert set(scraped) == {"gateway", "router", "worker-lp", "worker-hp", "predictor"}
    for name, port in scraped.items():
        service = effective_config(services[name])
        assert port_of(getattr(service, "metrics_listen", service.listen)) == port
    for name in ("gateway", "router", "worker-lp", "worker-hp"):
        host = effective_config(services[name]).otlp_endpoint.removeprefix("http://").partition(":")[0]
        assert host in services
    assert all(job["job_name"].startswith("ascendra-") for job in config["scrape_configs"])
    assert config["rule_files"] == ["/etc/prometheus/rules/*.yml"]


def test_tools_are_confined() -> None:
    """Their versions are named, their ports are this machine's, their root file systems read-only."""
    services = read_compose(*OVERLAY)["services"]
    for name in ("prometheus", "grafana", "jaeger"):
        service = services[name]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
