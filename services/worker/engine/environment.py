"""Environment variables that vLLM reads at import or at start; set before either."""

import os

_ALWAYS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Ours is for events; vLLM would write there why an engine dies.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU = {
    # Keeps the executor in the engine core's process on CPU: two processes a worker instead of three.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM compiles a few operators at their first use, log-probabilities among them: seconds in which every stream of
    # the worker stands still, and the end of the engine where there is no C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
    # More threads than cores to spare make every step wait for the slowest.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def prepare_environment(engine: str, cpu_threads: int) -> None:
    """Set what an engine ("cpu", "cuda" or "emulated") needs; variables that are set already keep their values."""
    for name, value in _ALWAYS.items():
        os.environ.setdefault(name, value)
    if engine == "cuda":
        return
    for name, value in _CPU.items():
        os.environ.setdefault(name, value)
    if cpu_threads > 1:
        os.environ["OMP_NUM_THREADS"] = str(cpu_threads)
    # It overrides kv_cache_memory_bytes, and an empty value kills the engine.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
