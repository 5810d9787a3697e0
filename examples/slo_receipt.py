"""What was promised, what was achieved, and why: `python examples/slo_receipt.py`."""

import asyncio
import os

from ascendra import AsyncClient, ResourceExhaustedError, SamplingParams, Slo

ADDRESS = os.environ.get("ASCENDRA_ADDRESS", "127.0.0.1:7100")


async def main() -> None:
    """Ask for an objective that is refused when nobody can make it, and print the receipt."""
    async with AsyncClient(ADDRESS) as client:
        try:
            completion = await client.generate(
                "Explain threads. " * 50,
                sampling=SamplingParams(max_tokens=32),
                slo=Slo(ttft_ms=2000, tbt_ms=200),
                on_overload="refuse",
            )
        except ResourceExhaustedError as error:
            print(f"refused: {error}; try again in {error.retry_after_ms} ms")
            return
        receipt = completion.receipt
        print(f"TTFT     {receipt.ttft_ms:7.1f} ms of {receipt.target.ttft_ms:g}")
        print(f"p99 gap  {receipt.p99_gap_ms:7.1f} ms of {receipt.target.tbt_ms:g}")
        print(f"met: {receipt.met}, first token by the {receipt.pool} pool, seed {receipt.seed}")
        for attempt in receipt.attempts:
            print(f"attempt {attempt.number} on {attempt.worker_id} ({attempt.role}): {attempt.reason}")
        for decision in (await client.explain(completion.request_id)).decisions:
            print(f"{decision.at_ms:8.1f} ms  {decision.kind}: {decision.rule}")


asyncio.run(main())
