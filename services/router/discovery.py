"""Which workers there are: a static list, registrations with a time to live, and a DNS name. Owns the links."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterable

from services.common.logging import get_logger
from services.common.tasks import end_tasks
from services.router.worker_link import WorkerLink

log = get_logger()

_SWEEP_S = 1.0
_MAX_LINKS = 1024


class WorkerPool:
    """Keeps one link per known address; a link that is attached is never dropped."""

    def __init__(
        self,
        make_link: Callable[[str], WorkerLink],
        *,
        static: Iterable[str] = (),
        dns_name: str = "",
        dns_interval_s: float = 5.0,
    ) -> None:
        """Make a pool; `run` fills it.

        Args:
            static: addresses that are always known.
            dns_name: host:port; every address of the host is a worker at that port.
        """
        self._make_link = make_link
        self._static = tuple(static)
        self._dns_name = dns_name
        self._dns_interval_s = dns_interval_s
        self._resolved: set[str] = set()
        self._registered: dict[str, float] = {}
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def links(self) -> list[WorkerLink]:
        """Return all links, attached or not."""
        return list(self._links.values())

    def find(self, worker_id: str) -> WorkerLink | None:
        """Return the link of a worker that has said Welcome; the attached one first."""
        found = [link for link in self._links.values() if link.worker_id == worker_id]
        return max(found, key=lambda link: link.attached, default=None)

    def register(self, address: str, ttl_s: float) -> None:
        """Know an address for ttl_s seconds from now. Raises ValueError when there are too many."""
        if address not in self._links and len(self._links) >= _MAX_LINKS:
            raise ValueError(f"at most {_MAX_LINKS} workers")
        self._registered[address] = time.monotonic() + ttl_s
        self._add(address)

    async def run(self) -> None:
        """Follow the sources until cancelled, then close every link."""
        for address in self._static:
            self._add(address)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._sweep())
                if self._dns_name:
                    tasks.create_task(self._resolve())
        finally:
            await end_tasks(self._tasks.values())

    def _add(self, address: str) -> None:
        if address not in self._links:
            link = self._links[address] = self._make_link(address)
            self._tasks[address] = asyncio.create_task(link.run(), name=f"link-{address}")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = time.monotonic()
            self._registered = {a: t for a, t in self._registered.items() if t > now_s}
            for address, task in list(self._tasks.items()):
                if task.done():
                    log.error("link_task_ended", address=address, exc_info=task.exception())
                    await self._remove(address)
                    self._add(address)
            wanted = {*self._static, *self._resolved, *self._registered}
            for address, link in list(self._links.items()):
                if address not in wanted and link.welcome is None:
                    log.info("worker_forgotten", address=address)
                    await self._remove(address)

    async def _remove(self, address: str) -> None:
        self._links.pop(address, None)
        await end_tasks([self._tasks.pop(address)])

    async def _resolve(self) -> None:
        host, _, port = self._dns_name.rpartition(":")
        loop = asyncio.get_running_loop()
        while True:
            try:
                found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            except OSError as error:
                log.warning("dns_failed", name=self._dns_name, why=str(error))  # what is known stays known
            else:
                self._resolved = {_joined(str(entry[4][0]), port) for entry in found}
                for address in self._resolved:
                    self._add(address)
            await asyncio.sleep(self._dns_interval_s)


def _joined(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
