"""Many requests at once over one stream: `python examples/session_many.py 100`."""

import asyncio
import os
import sys
import time

from ascendra import AscendraError, AsyncClient, Completion, SamplingParams, Session

ADDRESS = os.environ.get("ASCENDRA_ADDRESS", "127.0.0.1:7100")


async def ask(session: Session, number: int) -> Completion | None:
    """Return one completion; None, and a line that says why, when it fails."""
    try:
        return await session.generate(f"Question {number}: what is a list?", sampling=SamplingParams(max_tokens=16))
    except AscendraError as error:
        print(f"request {error.request_id}: {error} (reason {error.reason}, retry safe: {error.retry_safe})")
        return None


async def main() -> None:
    """Send the requests together and count what came back."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    began_s = time.monotonic()
    async with AsyncClient(ADDRESS) as client, client.session() as session:
        completions = await asyncio.gather(*(ask(session, number) for number in range(count)))
    done = [completion for completion in completions if completion]
    tokens = sum(len(completion.token_ids) for completion in done)
    met = sum(completion.receipt.met for completion in done)
    print(f"{len(done)} of {count} done, {tokens} tokens in {time.monotonic() - began_s:.1f} s, {met} within objective")


asyncio.run(main())
