"""Virtual-time simulator of a cluster: vLLM's scheduling rules, modelled step times, the production policy code."""
