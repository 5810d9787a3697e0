"""What a PromQL expression asks for, without a PromQL parser."""

import re

_KEYWORDS = {
    "and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool",
    "sum", "max", "min", "avg", "count", "rate", "increase", "abs", "clamp_min", "histogram_quantile",
    "max_over_time", "min_over_time", "avg_over_time", "label_values", "vector", "time", "topk",
}  # fmt: skip
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS = re.compile(r"\{[^{}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_NAME = re.compile(r"(?<![\w:.$])[a-zA-Z_:][\w:]*")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")


def metric_names(expression: str) -> set[str]:
    """Return the metrics (and recorded series) that an expression reads."""
    return set(_NAME.findall(_LABELS.sub(" ", _STRING.sub('""', expression)))) - _KEYWORDS


def label_names(expression: str) -> set[str]:
    """Return the labels that an expression matches or groups by."""
    bare = _STRING.sub('""', expression)
    matched = {name for braces in re.findall(r"\{([^{}]*)\}", bare) for name in _MATCHER.findall(braces)}
    grouped = {name.strip() for inside in _GROUPING.findall(bare) for name in inside.split(",") if name.strip()}
    return matched | grouped
