"""Training: the same seed gives the same weights, and the clock ends it."""

import time

import pytest
import torch

from demo.train import HELD_OUT_TOKENS, Outcome, new_model, train

pytestmark = pytest.mark.slow

VOCAB_SIZE = 512
STREAM = torch.randint(VOCAB_SIZE, (3 * HELD_OUT_TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other on a busy machine would make the tests slow."""
    torch.set_num_threads(1)


def trained(seed: int, *, steps: int, train_seconds: float) -> tuple[Outcome, torch.Tensor]:
    model = new_model(VOCAB_SIZE, seed)
    outcome = train(model, STREAM, steps=steps, train_seconds=train_seconds, seed=seed, report=lambda line: None)
    return outcome, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_same_seed_gives_the_same_weights() -> None:
    """Two runs of the same seed are equal bit for bit; another seed differs."""
    (outcome, first), (_, second), (_, other) = (trained(seed, steps=3, train_seconds=600.0) for seed in (0, 0, 1))
    assert (outcome.steps, outcome.cut_short) == (3, False)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_time_limit_ends_training() -> None:
    """A goal out of reach ends when the time is up, and the outcome says so."""
    started = time.monotonic()
    outcome, weights = trained(0, steps=1_000_000, train_seconds=1.0)
    assert outcome.cut_short
    assert 0 < outcome.steps < 1_000_000
    assert torch.isfinite(weights).all()
    assert time.monotonic() - started < 60


def test_short_corpus_is_refused() -> None:
    """A stream that leaves nothing to train on is an error that says how much is needed."""
    with pytest.raises(ValueError, match="tokens"):
        train(new_model(VOCAB_SIZE, 0), STREAM[:100], steps=1, train_seconds=1.0, seed=0, report=lambda line: None)
