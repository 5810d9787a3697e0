"""Calls from the front end, run in the engine core between two steps: each is atomic."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

from ascendra.v1 import common_pb2
from services.common.wire import model_from_proto, model_to_proto


class Control:
    """The methods that the front end may call, by name."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._methods: dict[str, Callable[..., Any]] = {
            "describe": self.describe,
            "withdraw": self.withdraw,
            "release": self.release,
            "export_kv": self.export_kv,
            "release_kv": self.release_kv,
            "reprioritise": self.reprioritise,
            "set_policy": self.set_policy,
            "set_step_time_model": self.set_step_time_model,
            "set_delivery": self.set_delivery,
            "step_time_model": self.step_time_model,
        }

    def call(self, method: str, arguments: str) -> Any:
        """Run a method with its arguments as a JSON list."""
        return self._methods[method](*json.loads(arguments))

    def describe(self) -> dict[str, Any]:
        """Return facts of the engine core that its front end does not know."""
        cache = self._scheduler.cache_config
        return {
            "kv_capacity_tokens": int(cache.num_gpu_blocks or 0) * int(self._scheduler.block_size),
            "prefix_block_tokens": int(self._scheduler.block_size) if cache.enable_prefix_caching else 0,
            "kv_transfer": self._scheduler.kv_transfer.describe(),
        }

    def withdraw(self, request_ids: Sequence[str]) -> dict[str, list[str]]:
        """Take back the requests that were never scheduled; those that were are left alone."""
        known = self._find(request_ids)
        withdrawn = [own_id for own_id, request in known.items() if never_scheduled(request)]
        self._finish(known[own_id] for own_id in withdrawn)
        return {"withdrawn": withdrawn, "unknown": [own_id for own_id in request_ids if own_id not in known]}

    def release(self, request_ids: Sequence[str]) -> bool:
        """Let go of the requests, wherever they are."""
        self._finish(self._find(request_ids).values())
        return True

    def export_kv(self, request_id: str) -> dict[str, Any]:
        """Take a running request out and keep its KV for another engine, or say why not."""
        request = self._find([request_id]).get(request_id)
        if request is None:
            return {"refused": "it is not in the engine"}
        try:
            return dict(self._scheduler.kv_transfer.export(request))
        except ValueError as error:
            return {"refused": str(error)}

    def release_kv(self, request_ids: Sequence[str]) -> bool:
        """Free the KV of exported requests that nobody reads any more."""
        for request in self._find(request_ids).values():
            self._scheduler.kv_transfer.release(request)
        return True

    def reprioritise(self, request_ids: Sequence[str], relegated: bool) -> bool:
        """Relegate or reinstate requests."""
        for request in self._find(request_ids).values():
            self._scheduler.queued(request).relegated = relegated
        return True

    def set_policy(self, role: str, value_function: str, token_budget: str, relegation: str) -> bool:
        """Change role and policies from the next step on."""
        planner = self._scheduler.planner
        planner.set_policy(
            replace(
                planner.settings,
                role=role,
                value_function=value_function,
                token_budget=token_budget,
                relegation=relegation,
            )
        )
        return True

    def set_step_time_model(self, encoded: str) -> bool:
        """Plan with a model learned elsewhere."""
        self._scheduler.planner.adopt(model_from_proto(common_pb2.StepTimeModel.FromString(bytes.fromhex(encoded))))
        return True

    def set_delivery(self, gap_inflation_s: float) -> bool:
        """Leave room in every gap for what passes outside the engine."""
        self._scheduler.planner.set_delivery(gap_inflation_s)
        return True

    def step_time_model(self) -> str:
        """Return the model in use."""
        return model_to_proto(self._scheduler.planner.model).SerializeToString().hex()

    def _find(self, request_ids: Sequence[str]) -> dict[str, Request]:
        wanted = set(request_ids)
        by_own_id = (
            (self._scheduler.standing(request).get("request_id"), request)
            for request in self._scheduler.requests.values()
        )
        return {own_id: request for own_id, request in by_own_id if own_id in wanted}

    def _finish(self, requests: Any) -> None:
        ids = [request.request_id for request in requests]
        if ids:
            self._scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)


def never_scheduled(request: Request) -> bool:
    """Tell whether no step has ever worked on a request."""
    waiting = request.status in (RequestStatus.WAITING, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)
    return waiting and not request.num_computed_tokens and not request.num_preemptions and not request.num_output_tokens


def install_control() -> None:
    """Give EngineCore the method that call_utility_async names (fixed arity: vLLM converts arguments one by one)."""
    EngineCore.ascendra_control = _ascendra_control


def _ascendra_control(self: Any, method: str, arguments: str) -> Any:
    return self.scheduler.control.call(method, arguments)
