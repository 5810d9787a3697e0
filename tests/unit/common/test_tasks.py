"""Tasks end, also those that swallow a cancellation."""

import asyncio

from services.common.tasks import end_tasks


async def test_a_task_that_forgets_a_cancellation_is_cancelled_again() -> None:
    """As a task group forgets one that comes while a child of it fails."""
    cancellations = 0

    async def stubborn() -> None:
        nonlocal cancellations
        while cancellations < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancellations += 1

    async def failing() -> None:
        raise ValueError("it failed before")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end_tasks(tasks, again_s=0.05)
    assert all(task.done() for task in tasks)
    assert cancellations == 2


async def test_nothing_to_end() -> None:
    """No tasks are ended at once."""
    await end_tasks([])
