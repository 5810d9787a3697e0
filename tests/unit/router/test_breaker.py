"""The circuit breaker."""

from services.router.breaker import Breaker


def test_it_opens_after_failures_in_a_row() -> None:
    """A success in between starts the count anew."""
    breaker = Breaker(3, 2.0)
    assert not breaker.failed(0.0)
    assert not breaker.failed(0.0)
    breaker.succeeded()
    assert not breaker.failed(1.0)
    assert not breaker.failed(1.0)
    assert breaker.failed(1.0)
    assert not breaker.allows(2.9)


def test_one_trial_decides() -> None:
    """After the pause one request is let through; its outcome closes the circuit or opens it for longer."""
    breaker = Breaker(1, 2.0)
    breaker.failed(0.0)
    assert breaker.allows(2.0)
    breaker.sent()
    assert not breaker.allows(2.0)
    breaker.failed(2.5)
    assert not breaker.allows(6.0)
    assert breaker.allows(6.5)
    breaker.sent()
    breaker.trial_lost()
    assert breaker.allows(6.5)
    breaker.sent()
    breaker.succeeded()
    assert breaker.allows(6.5)
    assert not breaker.tripped


def test_the_pause_is_bounded() -> None:
    """However often the trial fails, the worker is tried again within 30 s."""
    breaker = Breaker(1, 2.0)
    now_s = 0.0
    for _ in range(50):
        breaker.failed(now_s)
        assert breaker.allows(now_s + 30.0)
        breaker.sent()
        now_s += 30.0


def test_failures_of_one_death_open_it_once() -> None:
    """The many requests that fail with a worker do not lengthen the pause."""
    breaker = Breaker(3, 2.0)
    opened = [breaker.failed(1.0) for _ in range(80)]
    assert opened.count(True) == 1
    assert not breaker.allows(2.9)
    assert breaker.allows(3.0)
