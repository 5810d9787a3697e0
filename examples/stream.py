"""Stream one completion under an objective: `python examples/stream.py "Once upon a time"`."""

import asyncio
import os
import sys

from ascendra import AsyncClient, SamplingParams, Slo

ADDRESS = os.environ.get("ASCENDRA_ADDRESS", "127.0.0.1:7100")


async def main() -> None:
    """Print the text as it is generated."""
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    async with AsyncClient(ADDRESS) as client:
        async for chunk in client.stream(
            prompt, sampling=SamplingParams(max_tokens=64, temperature=0.7), slo=Slo(ttft_ms=1000, tbt_ms=100)
        ):
            print(chunk.text, end="", flush=True)
    print()


asyncio.run(main())
