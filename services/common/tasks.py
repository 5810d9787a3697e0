"""Ending tasks for good."""

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 5.0
"""Longer than any task of ours takes to clean up."""


async def end_tasks(tasks: Iterable["asyncio.Task[Any]"], again_s: float = _AGAIN_S) -> None:
    """Cancel tasks and return when all have ended, however they end.

    A task group that is cancelled in the moment in which one of its children fails reports the failure and forgets the
    cancellation (CPython 3.11); a task that handles the failure then goes on. It is cancelled again after `again_s`.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=again_s)
        for task in ended:
            if not task.cancelled():
                task.exception()  # seen: asyncio need not complain of it
