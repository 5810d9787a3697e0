"""The site that all cluster tests share: one fleet of real and emulated workers and a predictor."""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from services.policy.step_time import StepTimeBin, StepTimeModel
from tests.support.cluster import Site
from tests.support.load import Case, random_prompts
from tests.support.tiny_model import VOCAB_SIZE
from tests.support.worker_process import REPOSITORY, cpu_worker, emulated_worker

SLOW_STEP_S = 0.4
"""Step time of the worker "slow", long enough to see single steps."""
SPANS = "spans.sock"
"""In the site's directory: where its traced workers look for a collector."""
_MIXED, _LONG = 200, 80


@dataclass(frozen=True)
class Corpus:
    """Prompts with the greedy tokens of plain vLLM."""

    mixed: list[Case]
    """200, of all lengths."""
    long: list[Case]
    """80, of 220 tokens each."""


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    """The tokenizer, to decode all ids at once."""
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.fixture(scope="session")
def corpus_in_making(tiny_model: Path) -> "Iterator[Future[Corpus]]":
    """Plain vLLM at work, beside the start of the fleet."""
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(_run_plain_vllm, tiny_model)


@pytest.fixture(scope="session")
def site(tiny_model: Path, corpus_in_making: "Future[Corpus]") -> Iterator[Site]:
    """Workers, restarted by their fleet when they end, and a predictor; tests leave them as they found them.

    "cpu-lp" and "cpu-hp" run the tiny model; "lp-0", "lp-1" and "hp" are emulated; so is "slow", with long steps.
    "traced-0" and "traced-1", emulated too, send their spans to the socket SPANS, where a test may listen.
    """
    emulated = {"vocab_size": VOCAB_SIZE, "served_model_name": "tiny", "drain_timeout_s": 1.5}
    real = {"max_num_seqs": 128, "max_num_batched_tokens": 512}
    # Socket paths are limited to about a hundred bytes, which pytest's own directories use up.
    with tempfile.TemporaryDirectory(prefix="ascendra-") as folder:
        directory = Path(folder)
        steady = StepTimeModel(
            (StepTimeBin(0, a0=SLOW_STEP_S, a1=0.0, a2=1e-6, a3=0.0, a4=0.0, a5=0.0),), source="slow"
        )
        profile = directory / "slow.json"
        profile.write_text(json.dumps(steady.to_dict()))
        spans = {"otlp_endpoint": f"unix:{directory / SPANS}"}
        workers = {
            "cpu-lp": cpu_worker(tiny_model, role="low", **real),
            "cpu-hp": cpu_worker(tiny_model, role="high", **real),
            "lp-0": emulated_worker(role="low", **emulated),
            "lp-1": emulated_worker(role="low", **emulated),
            "hp": emulated_worker(role="high", **emulated),
            "slow": emulated_worker(role="low", step_time_profile=str(profile), max_num_seqs=600, **emulated),
            "traced-0": emulated_worker(**spans, **emulated),
            "traced-1": emulated_worker(**spans, **emulated),
        }
        running = Site(directory, workers, tiny_model)
        try:
            running.start()
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="session")
def corpus(corpus_in_making: "Future[Corpus]") -> Corpus:
    """Prompts and what plain vLLM makes of them."""
    return corpus_in_making.result(timeout=300)


def _run_plain_vllm(model: Path) -> Corpus:
    rng = random.Random(7)
    mixed = [
        (prompt, rng.choice([1, 2, rng.randint(3, 40), rng.randint(40, 120)]))
        for prompt in random_prompts(_MIXED, (1, 600), seed=1, vocab_size=VOCAB_SIZE)
    ]
    long = [(prompt, 220) for prompt in random_prompts(_LONG, (4, 120), seed=2, vocab_size=VOCAB_SIZE)]
    answer = subprocess.run(
        [sys.executable, "-m", "tests.support.plain_vllm", str(model)],
        input=json.dumps([*mixed, *long]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        check=True,
        text=True,
    )
    cases = [
        Case(tuple(prompt), tuple(ids))
        for (prompt, _), ids in zip([*mixed, *long], json.loads(answer.stdout), strict=True)
    ]
    return Corpus(cases[:_MIXED], cases[_MIXED:])
