"""Client SDK of Ascendra: LLM serving that keeps its latency promises."""
