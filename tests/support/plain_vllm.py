"""Greedy tokens of an untouched vLLM, as the oracle: `python -m tests.support.plain_vllm MODEL < cases > tokens`."""

import json
import os
import sys


def main() -> None:
    """Read [[prompt ids, max tokens], ...] and write the generated ids of each, all run in one batch."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM, SamplingParams

    cases = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints must not end up in the answer
    llm = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=64 << 20,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in cases]
    parameters = [
        SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        for _, max_tokens in cases
    ]
    results = llm.generate(prompts, parameters, use_tqdm=False)
    json.dump([list(result.outputs[0].token_ids) for result in results], output)
    output.close()


if __name__ == "__main__":
    main()
