"""For blocking code: a scripted router, and Ctrl-C."""

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.support.scripted_router import ScriptedRouter, counting


@pytest.fixture
def router_in_a_thread() -> Iterator[ScriptedRouter]:
    """A router that serves from a loop of its own."""
    router = ScriptedRouter(counting(5))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(router.start(), loop).result(30)
        yield router
        asyncio.run_coroutine_threadsafe(router.stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def python_handles_sigint() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever the tests run under: shells start background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
