"""Keeps the split between LP and HP: sets workers' roles as the offload pressure asks for it.

With several routers, let one of them do it: each sees only its own requests.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

from ascendra.v1 import worker_pb2
from services.common.logging import get_logger
from services.common.wire import ROLE_TO_PROTO
from services.policy.roles import RoleController, RolePolicy, assign_roles
from services.policy.state import Role
from services.router.rebalancer import Rebalancer
from services.router.worker_link import WorkerLink

log = get_logger()

_INTERVAL_S = 2.0


class RoleKeeper:
    """Runs the role controller on what the rebalancer saw."""

    def __init__(self, policy: RolePolicy, rebalancer: Rebalancer, links: Callable[[], Iterable[WorkerLink]]) -> None:
        self._policy = policy
        self._rebalancer = rebalancer
        self._links = links
        self._controller: RoleController | None = None
        self._seen = (0.0, 0, 0)
        self._seen_s = time.monotonic()

    async def run(self) -> None:
        """Follow the pressure until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self.update(time.monotonic())

    def update(self, now_s: float) -> None:
        """Take in the pressure since the last call and send the roles that have to change."""
        serving = {link.worker_id: link for link in self._links() if link.attached and not link.draining}
        if len(serving) < 2:
            return
        if self._controller is None:
            self._controller = RoleController(self._policy, len(serving))
        roles = {worker_id: link.instance.view.role for worker_id, link in serving.items()}
        busy_share, unsaved_share = self._pressure(now_s, sum(role is Role.HIGH for role in roles.values()))
        decision = self._controller.update(now_s, len(serving), busy_share, unsaved_share)
        for worker_id, role in assign_roles(list(serving), decision.hp_count, roles).items():
            if role is not roles[worker_id]:
                log.info("role_set", worker_id=worker_id, role=role, why=decision.reason)
                message = worker_pb2.SetRole(role=ROLE_TO_PROTO[role])
                serving[worker_id].send_control(worker_pb2.AttachRequest(set_role=message))

    def _pressure(self, now_s: float, high: int) -> tuple[float, float]:
        """Return the shares since the last call: HP time spent on urgent work, and requests at risk not saved."""
        rebalancer = self._rebalancer
        now = (rebalancer.urgent_work_s, rebalancer.offloads, rebalancer.unsaved)
        urgent_s, offloads, unsaved = (new - old for new, old in zip(now, self._seen, strict=True))
        elapsed_s, self._seen, self._seen_s = max(now_s - self._seen_s, 1e-3), now, now_s
        return urgent_s / (elapsed_s * max(high, 1)), unsaved / max(unsaved + offloads, 1)
