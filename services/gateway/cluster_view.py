"""What the routers say about the cluster, asked when somebody wants to know and kept for a moment."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from ascendra import AscendraError
from ascendra.v1 import cluster_pb2, inference_pb2
from services.gateway.routers import Routers

FRESH_S = 0.5
"""An answer this old is given again, in seconds."""


@dataclass(frozen=True, slots=True)
class RouterView:
    """One router's answer."""

    address: str
    status: cluster_pb2.GetStatusResponse | None
    """None when it did not answer."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment."""

    routers: Sequence[RouterView]

    @property
    def reachable(self) -> list[cluster_pb2.GetStatusResponse]:
        """Statuses of the routers that answered."""
        return [router.status for router in self.routers if router.status is not None]

    @property
    def workers(self) -> list[cluster_pb2.WorkerStatus]:
        """Every worker once, as seen by the router that heard from it last."""
        reported = [worker for status in self.reachable for worker in status.workers]
        # A router that is not attached yet knows a worker only by its address.
        ids = {worker.address: worker.worker_id for worker in reported if worker.worker_id}
        found: dict[str, cluster_pb2.WorkerStatus] = {}
        for worker in reported:
            key = worker.worker_id or ids.get(worker.address, worker.address)
            known = found.get(key)
            if known is None or _news(worker) < _news(known):
                found[key] = worker
        return sorted(found.values(), key=lambda worker: (worker.worker_id, worker.address))

    @property
    def ready(self) -> bool:
        """Whether a request could be served."""
        return any(worker.health == cluster_pb2.WORKER_HEALTH_READY for worker in self.workers)

    def load_by_model(self) -> dict[str, tuple[int, int]]:
        """Return requests (running, waiting) in the engines, by model."""
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for worker in self.workers:
            running[worker.model] += worker.running
            waiting[worker.model] += worker.waiting
        return {model: (running[model], waiting[model]) for model in running}

    def as_json(self) -> dict[str, Any]:
        """Return the snapshot as plain data."""
        counters: Counter[str] = Counter()
        attainment = []
        routers = []
        for router in self.routers:
            if router.status is None:
                routers.append({"address": router.address, "reachable": False, "error": router.error})
                continue
            status = as_plain(router.status)
            counters.update(status.pop("counters"))
            attainment += [{"router_id": status["router_id"], **row} for row in status.pop("attainment")]
            del status["workers"]
            routers.append({"address": router.address, "reachable": True, **status})
        return {
            "ready": self.ready,
            "routers": routers,
            "workers": [as_plain(worker) for worker in self.workers],
            "attainment": attainment,
            "counters": dict(counters),
        }


class ClusterView:
    """Asks all routers at once; those who ask at the same time share one answer."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers
        self._lock = asyncio.Lock()
        self._models_lock = asyncio.Lock()
        self._snapshot = Snapshot(())
        self._asked_s = -FRESH_S
        self._models: list[inference_pb2.Model] = []
        self._models_asked_s = -FRESH_S

    async def snapshot(self) -> Snapshot:
        """Return the cluster as it was at most FRESH_S ago. Takes no longer than the routers' time limit."""
        async with self._lock:
            if time.monotonic() - self._asked_s >= FRESH_S:
                views = await asyncio.gather(*(self._ask(index) for index in range(len(self._routers.addresses))))
                self._snapshot = Snapshot(views)
                self._asked_s = time.monotonic()
            return self._snapshot

    async def models(self) -> list[inference_pb2.Model]:
        """Return the served models as they were at most FRESH_S ago. Raises AscendraError."""
        async with self._models_lock:
            if time.monotonic() - self._models_asked_s >= FRESH_S:
                self._models = await self._routers.any.models()
                self._models_asked_s = time.monotonic()
            return self._models

    async def _ask(self, index: int) -> RouterView:
        address = self._routers.addresses[index]
        try:
            return RouterView(address, await self._routers.each[index].status())
        except AscendraError as error:
            return RouterView(address, None, error.message)


def as_plain(message: Message) -> dict[str, Any]:
    """Return a message as plain data: every field, enums by their short names ("ready"), absent messages as None."""
    return {field.name: _plain_field(message, field) for field in message.DESCRIPTOR.fields}


def _plain_field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_plain_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _plain_value(value, field)


def _plain_value(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return as_plain(value)
    if field.enum_type is not None:
        # WORKER_HEALTH_READY of enum WorkerHealth: "ready".
        names = field.enum_type.values_by_number
        zero = names[0].name.removesuffix("UNSPECIFIED")
        return names[value].name.removeprefix(zero).lower()
    return value


def _news(worker: cluster_pb2.WorkerStatus) -> tuple[bool, float]:
    """Order of what routers say about one worker: attached ones first, then by age."""
    return worker.health == cluster_pb2.WORKER_HEALTH_CONNECTING, worker.age_s
