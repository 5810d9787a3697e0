"""How many instances are HP, and which.

In simulation, with workers that give nobody up, HPs that follow the pressure keep far more requests in overload than a
fixed split or one pool; with Moore-Hodgson relegation every HP costs some (docs/report.md has the numbers).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.policy.state import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePolicy:
    """When the split between LP and HP changes."""

    hp_share: float = 0.125
    """HP instances to start with, as a share of all."""
    min_hp: int = 0
    """Fewest HP instances."""
    max_hp_share: float = 0.5
    """Most HP instances, as a share of all."""
    hold_s: float = 30.0
    """Pressure must last this long before a role changes, and changes are at least this far apart."""
    busy_share: float = 0.5
    """HP is under pressure while its urgent work fills more than this share of its time; the decodes that follow from
    it take a good part of the rest, so that saturated HPs show 0.6 to 0.8."""
    idle_share: float = 0.05
    """HP is not needed while its urgent work fills less than this."""
    smooth_s: float = 10.0
    """Shares are averaged over about this long: single intervals scatter."""


def default_hp_count(instances: int, hp_share: float = 0.125) -> int:
    """Return how many of so many instances start as HP: one in eight, at least one; a single one is not split."""
    return 0 if instances < 2 else min(max(1, round(instances * hp_share)), instances - 1)


def assign_roles(worker_ids: Sequence[str], hp_count: int, current: dict[str, Role] | None = None) -> dict[str, Role]:
    """Return each worker's role for `hp_count` HPs (0: all unified), changing as few current roles as possible."""
    if hp_count <= 0 or len(worker_ids) < 2:
        return dict.fromkeys(worker_ids, Role.UNIFIED)
    current = current or {}
    by_preference = sorted(worker_ids, key=lambda worker_id: (current.get(worker_id) is not Role.HIGH, worker_id))
    high = set(by_preference[:hp_count])
    return {worker_id: Role.HIGH if worker_id in high else Role.LOW for worker_id in worker_ids}


@dataclass(frozen=True, slots=True)
class RoleDecision:
    """The number of HPs from now on, and why."""

    hp_count: int
    reason: str


class RoleController:
    """Follows the offload pressure with hysteresis: one HP more or less at a time."""

    def __init__(self, policy: RolePolicy, instances: int) -> None:
        self.policy = policy
        self.hp_count = default_hp_count(instances, policy.hp_share)
        self._changed_s = self._updated_s = float("-inf")
        self._busy_share = self._unsaved_share = 0.0
        self._wants = 0
        self._wants_since_s = 0.0

    def update(self, now_s: float, instances: int, urgent_busy_share: float, unsaved_share: float) -> RoleDecision:
        """Take in the pressure since the last call and return the number of HPs.

        Args:
            instances: instances that serve now.
            urgent_busy_share: share of HP time spent on urgent work, 0 to 1.
            unsaved_share: share of requests that would have been offloaded but no HP could take in time.
        """
        policy = self.policy
        weight = 1 - math.exp(-(now_s - self._updated_s) / policy.smooth_s)
        self._updated_s = now_s
        self._busy_share += weight * (urgent_busy_share - self._busy_share)
        self._unsaved_share += weight * (unsaved_share - self._unsaved_share)
        most = min(int(instances * policy.max_hp_share), instances - 1)
        least = min(policy.min_hp, most)
        bounded = min(max(self.hp_count, least), max(most, 0))
        if bounded != self.hp_count:
            return self._change(bounded, now_s, "bounds for the instances that serve")
        wants = 0
        if self._busy_share > policy.busy_share and self._unsaved_share > 0.01 and self.hp_count < most:
            wants = 1
        elif self._busy_share < policy.idle_share and self.hp_count > max(least, 1 if policy.hp_share > 0 else 0):
            wants = -1
        if wants != self._wants:
            self._wants, self._wants_since_s = wants, now_s
        lasted = now_s - max(self._wants_since_s, self._changed_s) >= policy.hold_s
        if wants and lasted:
            reason = "urgent work fills HP" if wants > 0 else "HP has next to nothing urgent"
            return self._change(self.hp_count + wants, now_s, reason)
        return RoleDecision(self.hp_count, "unchanged")

    def _change(self, hp_count: int, now_s: float, reason: str) -> RoleDecision:
        self.hp_count, self._changed_s = hp_count, now_s
        return RoleDecision(hp_count, reason)
