"""Measurements with real vLLM on this machine's CPU."""
