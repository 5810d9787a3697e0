"""What the router adds: latency and CPU per token against the same client directly on a worker."""
