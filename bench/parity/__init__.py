"""The gateway's answers against those of `vllm serve`."""
