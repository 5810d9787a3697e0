"""Generate twice with vLLM, from a short conversation and after a long prompt; print both texts as one JSON line."""

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    TORCH_COMPILE_DISABLE="1",  # as in a worker
)

from vllm import LLM, SamplingParams

PARAMS = SamplingParams(temperature=0.8, seed=1, max_tokens=80, min_tokens=40)


def main(model: str) -> None:
    """Load the model from a folder and generate."""
    llm = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=2048)
    short = llm.chat([{"role": "user", "content": "What is asyncio.Queue?"}], PARAMS, use_tqdm=False)[0]
    prompt = llm.get_tokenizer().encode("Return the name of the file. " * 250)[:1900]
    long = llm.generate([{"prompt_token_ids": prompt}], PARAMS, use_tqdm=False)[0]
    print(json.dumps([short.outputs[0].text, long.outputs[0].text]))


if __name__ == "__main__":
    main(sys.argv[1])
