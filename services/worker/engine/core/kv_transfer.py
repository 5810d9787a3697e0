"""Hands the KV of running requests to another engine, through the scheduler side of vLLM's NIXL connector.

The connector was made to hand over finished prefills. A request that decodes is no different to it, once it is finished
as one whose length limit is reached: its blocks are kept, and freed when the reader says that it has them.
"""

import math
from typing import Any

from vllm.v1.request import Request, RequestStatus

_NEVER_LEASED_S = 0.0
"""A lease that is over, on the clock of the connector."""


class KvTransfer:
    """The KV blocks of a scheduler's requests, for other engines."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def describe(self) -> dict[str, Any] | None:
        """Return facts on which transfers depend; None when the engine has no connector, or one group is not all."""
        scheduler = self._scheduler
        cache = scheduler.kv_cache_config
        if scheduler.connector is None or len(cache.kv_cache_groups) != 1:
            return None
        config = scheduler.vllm_config
        [group] = cache.kv_cache_groups
        bytes_per_token = group.kv_cache_spec.page_size_bytes * len(group.layer_names) // scheduler.block_size
        tensor_parallel = config.parallel_config.tensor_parallel_size
        facts = (config.cache_config.cache_dtype, config.model_config.dtype, scheduler.block_size, bytes_per_token)
        return {
            "bytes_per_token": bytes_per_token * tensor_parallel,
            "compatibility": "nixl " + " ".join(map(str, (*facts, tensor_parallel))),
        }

    def export(self, request: Request) -> dict[str, Any]:
        """Take a request that decodes out of the engine and return how to read its KV.

        Its blocks are held until they were read, `release`, or the end of the lease.

        Raises:
            ValueError: it does not decode.
        """
        if request.status != RequestStatus.RUNNING or request.is_prefill_chunk or not request.num_output_tokens:
            raise ValueError("it does not decode")
        scheduler = self._scheduler
        request.kv_transfer_params = {"do_remote_decode": True}
        # The worker side ignores what it was never told to be part of a batch.
        scheduler.connector.connector_scheduler._reqs_in_batch.add(request.request_id)
        scheduler.running = [other for other in scheduler.running if other is not request]
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        params, _ = scheduler._free_request(request)
        # The reader expects blocks for all its tokens and computes the last one itself; that one may lack a block here
        # (it was not computed yet), or later ones may have one (of steps that are still in flight).
        tokens = request.num_tokens
        blocks = math.ceil(tokens / scheduler.block_size)
        [ids] = params["remote_block_ids"]
        ids = list(ids[:blocks])
        params["remote_block_ids"] = [ids + ids[-1:] * (blocks - len(ids))]
        return {"params": params, "tokens": tokens, "blocks": blocks, "generated": request.num_output_tokens}

    def unread(self, output: Any) -> list[Request]:
        """Return whose KV could not be read, by what the connector said after a step (None: nothing).

        vLLM names the requests; older ones (0.26) name the blocks that they wait for.
        """
        if output is None:
            return []
        requests = self._scheduler.requests
        named = set(getattr(output, "failed_recving", None) or ())
        if output.invalid_block_ids:
            named |= {name for name, request in requests.items() if self._awaits(request, output.invalid_block_ids)}
        return [requests[name] for name in named if name in requests]

    def _awaits(self, request: Request, blocks: set[int]) -> bool:
        if request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            return False
        held = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return any(not blocks.isdisjoint(group) for group in held)

    def release(self, request: Request) -> None:
        """Free the blocks of an exported request, unless they are free already."""
        if request.is_finished():
            # The worker side frees what its lease has run out for; the scheduler alone must not.
            self._scheduler.connector.connector_scheduler._reqs_need_send[request.request_id] = _NEVER_LEASED_S


def imports_kv(request: Request) -> bool:
    """Tell whether a waiting request will read its KV from elsewhere: of its prefill one token is left."""
    return bool((request.kv_transfer_params or {}).get("do_remote_prefill"))


def kv_is_here(scheduler: Any) -> list[Request]:
    """Return the requests whose KV was read and who wait for their first step."""
    return [scheduler.requests[name] for name in scheduler.finished_recving_kv_req_ids if name in scheduler.requests]
