"""Puts the router together, runs it, drains it."""

import asyncio
import gc
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import grpc.aio

from ascendra.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from services.common.access import Access, Right, authorizer
from services.common.grpc_server import GrpcServer, start_grpc_server
from services.common.http_status import HttpStatus, start_http_status
from services.common.lifecycle import announce_ready
from services.common.logging import get_logger
from services.common.tasks import end_tasks
from services.common.tracing import make_tracer
from services.policy.late_binding import Committed
from services.router import metrics
from services.router.binder import Binder
from services.router.cluster_servicer import ClusterServicer
from services.router.config import LATE, RouterConfig
from services.router.decision_log import DecisionLog
from services.router.discovery import WorkerPool
from services.router.dispatcher import Dispatcher
from services.router.estimates import backlog_s, held_s
from services.router.instance import Instance
from services.router.mover import Mover
from services.router.prediction import Predictions, token_load_model
from services.router.rebalancer import Rebalancer
from services.router.relay import Relays
from services.router.relief import StreamRelief
from services.router.role_keeper import RoleKeeper
from services.router.servicer import InferenceServicer
from services.router.text import TextCodec
from services.router.validation import Limits
from services.router.worker_events import WorkerEvents
from services.router.worker_link import LinkSettings, WorkerLink

log = get_logger()

_HEALTHS = {
    "ready": cluster_pb2.WORKER_HEALTH_READY,
    "connecting": cluster_pb2.WORKER_HEALTH_CONNECTING,
    "tripped": cluster_pb2.WORKER_HEALTH_TRIPPED,
    "draining": cluster_pb2.WORKER_HEALTH_DRAINING,
}
RIGHTS = {
    "/ascendra.v1.InferenceService/": (Right.GENERATE, Right.ACT_FOR_TENANTS),
    "/ascendra.v1.InferenceService/ListModels": (Right.GENERATE, Right.ACT_FOR_TENANTS, Right.MONITOR),
    "/ascendra.v1.ClusterService/Explain": (Right.GENERATE, Right.ACT_FOR_TENANTS),
    "/ascendra.v1.ClusterService/GetStatus": (Right.MONITOR, Right.ACT_FOR_TENANTS),
    "/ascendra.v1.ClusterService/WatchStatus": (Right.MONITOR, Right.ACT_FOR_TENANTS),
    "/ascendra.v1.ClusterService/RegisterWorker": (Right.REGISTER,),
}
"""Of which rights a caller needs one; the rest is for administrators."""

_MONITOR_S = 0.05
_MODELS_PUBLISHED_S = 1.0
_CLOSE_S = 2.0


class Router:
    """A router process."""

    def __init__(self, config: RouterConfig) -> None:
        """Load the tokenizer and wire everything up; nothing runs yet. Raises FileNotFoundError, ConfigError."""
        self.config = config
        self.router_id = config.router_id or f"router-{socket.gethostname()}-{os.getpid()}"
        self.codec = TextCodec(Path(config.model), threads=config.encode_threads, queue=config.encode_queue)
        self.model_name = config.model_name or Path(config.model).resolve().name
        self._access = Access(config.api_keys_file)
        tls = config.tls.as_client()
        self.predictions = Predictions(config.predictor, self.router_id, config.prediction_max_age_s, tls)
        self.decision_log = DecisionLog(config.decision_log)
        self.pool = WorkerPool(
            self._make_link,
            static=config.workers,
            dns_name=config.worker_dns,
            dns_interval_s=config.worker_dns_interval_s,
        )
        self.dispatcher = Dispatcher(config, self.predictions, self.decision_log, self.pool.links)
        self.rebalancer = Rebalancer(self.dispatcher)
        self.binder = Binder(self.dispatcher, self.rebalancer) if config.placement == LATE else None
        self.mover = Mover(self.dispatcher)
        self.relief = StreamRelief(self.dispatcher, self.mover)
        self.relays = Relays(config.sinks, self.router_id, tls)
        self._events = WorkerEvents(self.dispatcher, self.rebalancer, self.mover)
        self._tracer = make_tracer("router", self.router_id, config.otlp_endpoint, config.trace_sample_ratio)
        self.closing = asyncio.Event()
        self.started = asyncio.Event()
        self.address = ""
        """Where clients reach it, once started."""
        metrics.WORKERS.rows = self._worker_rows
        metrics.HELD_BACKLOG.set_function(self._held_backlog_s)
        metrics.WORKERS.healths = self._worker_healths
        objectives_s = {name: (one.ttft_ms / 1000, one.tbt_ms / 1000) for name, one in config.slo_classes.items()}
        metrics.configure(objectives_s, config.max_live_requests)

    def limits(self) -> Limits:
        """Return what the served model allows, by what its workers say."""
        attached = [link.known for link in self.pool.links() if link.attached]
        return Limits(
            model_name=self.model_name,
            max_model_len=min((known.max_model_len for known in attached), default=self.codec.max_model_len),
            vocab_size=min((known.vocab_size for known in attached), default=self.codec.vocab_size),
            max_text_bytes=self.config.max_text_bytes,
            default_max_tokens=self.config.default_max_tokens,
            sinks=self.relays.names,
        )

    def is_ready(self) -> bool:
        """Return whether requests are taken: some worker is attached and the router does not drain."""
        return self.dispatcher.admission.open and any(link.attached for link in self.pool.links())

    async def run(self, stop: asyncio.Event) -> int:
        """Serve until `stop` is set, then drain; returns the exit status."""
        server = await start_grpc_server(
            self.config.listen,
            self._register,
            tls=self.config.tls,
            authorize=authorizer(self._access, RIGHTS),
            reuse_port=self.config.reuse_port,
            serving=False,
        )
        http = await self._start_http()
        gc.collect()
        gc.freeze()
        background = asyncio.create_task(self._background(server), name="background")
        self.address = server.address
        self.started.set()
        http_address = http.address if http is not None else ""
        announce_ready("router", address=server.address, http=http_address, router_id=self.router_id)
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, background], return_when=asyncio.FIRST_COMPLETED)
            if background.done():
                background.result()  # raises what broke it
            await self._drain(server)
        finally:
            stopped.cancel()
            await self._close(server, http, background)
        return 0

    def _register(self, server: grpc.aio.Server) -> Sequence[str]:
        inference = InferenceServicer(
            self.config, self.codec, self.dispatcher, self.relays, self.limits, self.closing, self._tracer
        )
        cluster = ClusterServicer(self.router_id, self.pool, self.dispatcher, self.closing)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, server)
        return ["ascendra.v1.InferenceService", "ascendra.v1.ClusterService"]

    async def _start_http(self) -> HttpStatus | None:
        listen = self.config.metrics_listen
        return await start_http_status(listen, self.is_ready) if listen else None

    def _make_link(self, address: str) -> WorkerLink:
        config = self.config
        settings = LinkSettings(
            router_id=self.router_id,
            model_name=self.model_name,
            silence_s=config.silence_s,
            stall_s=config.stall_s,
            stall_unknown_s=config.stall_unknown_s,
            cancel_timeout_s=config.cancel_timeout_s,
            breaker_failures=config.breaker_failures,
            breaker_open_s=config.breaker_open_s,
            tls=config.tls.as_client(),
        )
        instance = Instance(address, token_load_model(), config.budget_policy)
        return WorkerLink(address, settings, instance, self._events)

    async def _background(self, server: GrpcServer) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.pool.run())
            tasks.create_task(self.predictions.run())
            tasks.create_task(self.rebalancer.run())
            if self.binder is not None:
                tasks.create_task(self.binder.run())
            tasks.create_task(self.mover.run())
            if self.config.relief and self.config.move_running:
                tasks.create_task(self.relief.run())
            tasks.create_task(self.relays.run())
            tasks.create_task(self._monitor(server))
            if self.config.elastic_roles:
                keeper = RoleKeeper(self.config.role_policy, self.rebalancer, self.pool.links)
                tasks.create_task(keeper.run())

    async def _monitor(self, server: GrpcServer) -> None:
        """Publish readiness as it changes, and how late the loop runs."""
        published = False
        largest_lag_s, window_s = 0.0, time.monotonic()
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(_MONITOR_S)
            now_s = time.monotonic()
            largest_lag_s = max(largest_lag_s, now_s - before_s - _MONITOR_S)
            if self.is_ready() != published:
                published = not published
                await server.set_serving(published)
            if now_s - window_s >= _MODELS_PUBLISHED_S:
                metrics.LOOP_LAG.set(largest_lag_s)
                largest_lag_s, window_s = 0.0, now_s
                self.predictions.policy([link.worker_id for link in self.pool.links() if link.attached], now_s)

    async def _drain(self, server: GrpcServer) -> None:
        log.info("draining", live=len(self.dispatcher.live), timeout_s=self.config.drain_timeout_s)
        await server.set_serving(False)
        await asyncio.sleep(self.config.settle_s)
        self.dispatcher.admission.open = False
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await self.dispatcher.idle()
        except TimeoutError:
            self.dispatcher.fail_all("the router stops")
        await self.relays.flush(_CLOSE_S)
        self.closing.set()

    async def _close(self, server: GrpcServer, http: HttpStatus | None, background: "asyncio.Task[None]") -> None:
        self.closing.set()
        await server.stop(_CLOSE_S)
        await end_tasks([background])
        if http is not None:
            await http.stop()
        if self._tracer is not None:
            await self._tracer.close()
        self.codec.close()
        await asyncio.to_thread(self.decision_log.close)
        log.info("stopped")

    def _worker_rows(self) -> Iterable[metrics.WorkerRow]:
        now_s = time.monotonic()
        for link in self.pool.links():
            if link.attached:
                instance, view = link.instance, self.dispatcher.placer.view(link, now_s)
                yield metrics.WorkerRow(
                    worker_id=link.worker_id,
                    role=view.role.value,
                    queued=len(instance.queue),
                    waiting=max(instance.waiting, 0),
                    running=instance.running,
                    kv_usage=instance.kv_usage,
                    committed_s=Committed.of(view, instance.budget).work_s,
                    backlog_s=backlog_s(view, instance.budget),
                    age_s=now_s - instance.last_message_s,
                    model_age_s=self.predictions.age_s(link.worker_id, now_s),
                    round_trip_s=instance.round_trip_s,
                )

    def _held_backlog_s(self) -> float:
        tokens = self.binder.held_tokens() if self.binder is not None else 0
        now_s = time.monotonic()
        attached = [link for link in self.pool.links() if link.attached]
        views = [(self.dispatcher.placer.view(link, now_s), link.instance.budget) for link in attached]
        return max((held_s(tokens, view, budget) for view, budget in views), default=0.0)

    def _worker_healths(self) -> Mapping[str, int]:
        healths = Counter(link.health() for link in self.pool.links())
        return {name: healths[value] for name, value in _HEALTHS.items()}
