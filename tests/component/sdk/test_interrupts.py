"""Ctrl-C while the blocking client works."""

import os
import random
import signal
import threading

import pytest

from ascendra.blocking import Client
from tests.support.scripted_router import ScriptedRouter


def test_an_interrupt_at_any_time_is_all_that_the_caller_sees(
    router_in_a_thread: ScriptedRouter, python_handles_sigint: None
) -> None:
    """Whatever a stream is at when Ctrl-C comes, it ends without another error, and the client goes on working."""
    rng = random.Random(1)
    with Client(router_in_a_thread.address) as client:
        for _ in range(25):
            timer = threading.Timer(rng.uniform(0.005, 0.03), os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                for _ in client.watch_status(interval_s=0.001):
                    pass
            timer.join()
        assert client.status().workers
