"""What a service's /metrics shows."""

import urllib.request
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

TIMEOUT_S = 30.0


class Scrape:
    """One answer of /metrics. Blocks while it asks: call it in a thread beside a running loop."""

    def __init__(self, address: str) -> None:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
        self.names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
        """Of all metrics, as in their TYPE lines; those without a sample too."""
        self.samples: list[Sample] = [s for family in text_string_to_metric_families(text) for s in family.samples]
        self.names |= {sample.name for sample in self.samples}

    def find(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of a name with these labels among theirs."""
        return [s for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a name with these labels among theirs."""
        return sum(sample.value for sample in self.find(name, **labels))

    def label_values(self) -> Iterable[str]:
        """Return every label value."""
        return {value for sample in self.samples for value in sample.labels.values()}
