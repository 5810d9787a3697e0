"""Hypothesis on a machine that may be busy: no time limit by example."""

from hypothesis import settings

settings.register_profile("busy-machine", settings(deadline=None))
settings.load_profile("busy-machine")
