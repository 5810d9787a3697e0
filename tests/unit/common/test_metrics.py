"""Bounded labels, and the histogram by class."""

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common.metrics import OTHER, TTFT_BUCKETS_S, ClassHistogram, bounded


@settings(deadline=None)
@given(st.text(), st.sets(st.text()))
def test_only_known_values_become_labels(value: str, known: set[str]) -> None:
    """Anything else is "other"."""
    assert bounded(value, known) in known | {OTHER}


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), max_size=50), st.floats(0.001, 90))
def test_the_share_within_the_objective_is_exact(times_s: list[float], objective_s: float) -> None:
    """The objective is a bucket's limit, so its bucket counts exactly the times that met it; sum and count agree."""
    histogram = ClassHistogram("t_seconds", "Time.", TTFT_BUCKETS_S)
    histogram.straddle([objective_s])
    for time_s in times_s:
        histogram.observe("default", time_s)
    registry = CollectorRegistry()
    registry.register(histogram)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = {(s.name, s.labels.get("le")): s.value for family in families for s in family.samples}
    within = [value for (name, limit), value in samples.items() if limit is not None and float(limit) == objective_s]
    if times_s:
        assert within == [sum(time_s <= objective_s for time_s in times_s)]
        assert samples["t_seconds_count", None] == samples["t_seconds_bucket", "+Inf"] == len(times_s)
        assert abs(samples["t_seconds_sum", None] - sum(times_s)) < 1e-6
    else:
        assert not samples


def test_classes_are_counted_apart() -> None:
    """One class's times leave another's alone."""
    histogram = ClassHistogram("t_seconds", "Time.", (1.0,))
    histogram.observe("a", 0.5)
    histogram.observe("b", 2.0)
    (family,) = histogram.collect()
    counts = {tuple(s.labels.values()): s.value for s in family.samples if s.name == "t_seconds_bucket"}
    assert counts == {("a", "1.0"): 1, ("a", "+Inf"): 1, ("b", "1.0"): 0, ("b", "+Inf"): 1}
