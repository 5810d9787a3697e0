"""Whether the scheduler of the installed vLLM is the one our mixin was written for."""

import inspect
from typing import Any

EXPECTED_PARAMETERS: dict[str, tuple[str, ...]] = {
    "schedule": ("self",),
    "update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "add_request": ("self", "request"),
    "finish_requests": ("self", "request_ids", "finished_status"),
}
"""Leading parameters of the methods that we override or call; vLLM may add more with defaults."""


def scheduler_mismatches(scheduler: type[Any] | None = None) -> list[str]:
    """Say what does not fit; empty when everything does."""
    if scheduler is None:
        from vllm.v1.core.sched.scheduler import Scheduler

        scheduler = Scheduler
    found = []
    for name, expected in EXPECTED_PARAMETERS.items():
        method = getattr(scheduler, name, None)
        if method is None:
            found.append(f"Scheduler.{name} is missing")
            continue
        parameters = list(inspect.signature(method).parameters.values())
        if tuple(parameter.name for parameter in parameters[: len(expected)]) != expected:
            found.append(f"Scheduler.{name} takes {[parameter.name for parameter in parameters]}")
            continue
        required = [
            parameter.name
            for parameter in parameters[len(expected) :]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        if required:
            found.append(f"Scheduler.{name} requires {required}")
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

    look_up = list(inspect.signature(KVCacheCoordinator.find_longest_cache_hit).parameters)
    if look_up != ["self", "block_hashes", "max_cache_hit_length"]:
        found.append(f"KVCacheCoordinator.find_longest_cache_hit takes {look_up}")
    source = inspect.getsource(scheduler.__init__)
    found += [
        f"Scheduler has no attribute {name}"
        for name in ("waiting", "running", "requests", "max_num_scheduled_tokens", "kv_cache_manager")
        if f"self.{name}" not in source
    ]
    return found


def kv_transfer_mismatches() -> list[str]:
    """Say what of the scheduler and of its NIXL connector is not as our exports of KV need it."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
    except ImportError as error:
        return [f"no NIXL connector: {error}"]
    source = inspect.getsource(NixlBaseConnectorScheduler.__init__)
    found = [
        f"the NIXL connector has no attribute {name}"
        for name in ("_reqs_in_batch", "_reqs_need_send")
        if f"self.{name}" not in source
    ]
    free = getattr(Scheduler, "_free_request", None)
    if free is None or list(inspect.signature(free).parameters)[:2] != ["self", "request"]:
        found.append("Scheduler._free_request is missing or takes something else")
    return found
