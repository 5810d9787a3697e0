"""The routers behind the gateway: one session each for the streams, and clients for questions."""

import itertools
from collections.abc import Sequence

from ascendra import AscendraError, AsyncClient, RetryPolicy, Session, Tls
from ascendra.errors import CONNECTION_LOST


class FailoverPolicy(RetryPolicy):
    """Repeats only what a lost connection took away: whether to try again after a refusal is the caller's choice."""

    def wait_s(self, error: AscendraError, failures: int, *, started: bool, others: int, jitter: float) -> float | None:
        """Return the wait before another attempt, None to give up."""
        if not started and error.reason != CONNECTION_LOST:
            return None
        return RetryPolicy.wait_s(self, error, failures, started=started, others=others, jitter=jitter)


class Routers:
    """Spreads requests over one session a router; each goes on over the other routers when its own is lost."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        request_timeout_s: float,
        status_timeout_s: float,
        credentials: Tls | None = None,
        api_key: str = "",
    ) -> None:
        self.addresses = tuple(addresses)
        self._clients = [
            AsyncClient(
                [*addresses[start:], *addresses[:start]],
                timeout_s=request_timeout_s,
                control_timeout_s=status_timeout_s,
                retry=FailoverPolicy(),
                credentials=credentials,
                api_key=api_key,
            )
            for start in range(len(addresses))
        ]
        self._sessions = [client.session() for client in self._clients]
        self._turn = itertools.cycle(self._sessions)
        self.any = self._clients[0]
        """Asks whichever router answers."""
        self.each = [
            AsyncClient(address, control_timeout_s=status_timeout_s, credentials=credentials, api_key=api_key)
            for address in addresses
        ]
        """Asks one router; in the order of the addresses."""

    def next_session(self) -> Session:
        """Return the session for the next request."""
        return next(self._turn)

    async def close(self) -> None:
        """Close everything; requests in flight fail."""
        for session in self._sessions:
            await session.close()
        for client in (*self._clients, *self.each):
            await client.close()
