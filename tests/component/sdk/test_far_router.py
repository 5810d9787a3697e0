"""A router far away."""

import asyncio

from ascendra import AsyncClient, RetryPolicy
from services.common.channels import open_channel
from tests.support import scripted_router as scripted

DELAY_S = 0.6


async def copy_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on, all of them late."""
    try:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(DELAY_S)
            writer.write(data)
    finally:
        writer.close()


async def test_a_slow_handshake_is_waited_for() -> None:
    """A first answer that takes long is no failure to connect, neither of a client nor between services."""
    async with scripted.serve(scripted.counting(2)) as router:
        host, _, port = router.address.rpartition(":")

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(copy_late(reader, onward_writer), copy_late(onward_reader, writer))

        far = await asyncio.start_server(connect, "127.0.0.1", 0)
        address = f"127.0.0.1:{far.sockets[0].getsockname()[1]}"
        async with far, AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:
            assert (await client.generate("x", timeout_s=60)).token_ids == [0, 1]
            async with open_channel(address) as channel, asyncio.timeout(60):
                await channel.channel_ready()
