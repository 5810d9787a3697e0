"""Rounds of decisions."""

import asyncio
import time
from collections.abc import Callable

from services.common.logging import get_logger

log = get_logger()


async def run_rounds(
    decide: Callable[[float], None],
    changed: asyncio.Event,
    interval_s: float,
    pause_s: Callable[[float], float],
) -> None:
    """Decide when something changed, and at least every interval_s, until cancelled.

    Args:
        decide: takes one round of decisions at a monotonic time; when it fails, things stay as they are until the next.
        changed: set by whoever knows of something to decide.
        pause_s: returns how long nothing is decided after a round that took so many seconds, lest rounds take all the
            time.
    """
    while True:
        try:
            async with asyncio.timeout(interval_s):
                await changed.wait()
        except TimeoutError:
            pass
        changed.clear()
        began_s = time.monotonic()
        try:
            decide(began_s)
        except Exception:
            log.exception("round_failed", of=decide.__qualname__)
        await asyncio.sleep(pause_s(time.monotonic() - began_s))
