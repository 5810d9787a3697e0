"""Reports engine steps to the predictor, batched; never blocks, and drops the oldest when the predictor is away."""

import asyncio
import time
from collections import deque

import grpc
import grpc.aio

from ascendra.errors import InvalidArgumentError
from ascendra.tls import Tls
from ascendra.v1 import common_pb2, predictor_pb2, predictor_pb2_grpc
from services.common.channels import Connector
from services.common.logging import get_logger
from services.common.reporting import write_reports
from services.common.wire import ROLE_TO_PROTO
from services.worker import metrics
from services.worker.engine.contract import EngineDead, StepReport
from services.worker.worker import Worker

log = get_logger()

_BATCH_S = 0.1
_MAX_BATCH = 512
_MAX_PENDING = 4096
_RETRY_S = (0.2, 5.0)
"""First and longest pause between two attempts."""


class TelemetryReporter:
    """Keeps one ReportTelemetry stream open."""

    def __init__(self, worker: Worker, address: str, tls: Tls | None = None) -> None:
        self._worker = worker
        self._address = address
        self._tls = tls
        self._pending: deque[tuple[common_pb2.StepTelemetry, float]] = deque(maxlen=_MAX_PENDING)
        self._warm_start: common_pb2.StepTimeModel | None = None
        """The model in use when a stream begins, until it is told."""
        worker.engine.on_report(self._on_report)

    async def run(self) -> None:
        """Report until cancelled; reconnects for ever."""
        connector = Connector(self._address, self._tls)
        pause_s = _RETRY_S[0]
        said = ""
        try:
            while True:
                opened_s = time.monotonic()
                try:
                    stub = predictor_pb2_grpc.PredictorServiceStub(await connector.channel())
                    self._warm_start = await self._worker.engine.step_time_model()
                    call = stub.ReportTelemetry()  # type: ignore[call-arg]  # written through the call
                    await write_reports(call, self._due, _BATCH_S)
                except grpc.aio.AioRpcError as error:
                    status = error.code().name
                    if status != said:  # once, however often it is tried again
                        log.info("predictor_away", address=self._address, status=status)
                    said = status
                except InvalidArgumentError as error:
                    log.error("certificates_unreadable", why=error.message)
                except EngineDead as error:  # or it stands still: the next attempt tells
                    log.warning("step_time_model_unknown", why=str(error))
                lasted = time.monotonic() - opened_s > _RETRY_S[1]
                said = "" if lasted else said
                pause_s = _RETRY_S[0] if lasted else min(pause_s * 2, _RETRY_S[1])
                await asyncio.sleep(pause_s)
        finally:
            await connector.close()

    def _due(self) -> predictor_pb2.ReportTelemetryRequest | None:
        if not self._pending and self._warm_start is None:
            return None
        worker = self._worker
        request = predictor_pb2.ReportTelemetryRequest(
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            role=ROLE_TO_PROTO[worker.role],
            warm_start=self._warm_start,
        )
        self._warm_start = None
        now_s = time.monotonic()
        for _ in range(min(len(self._pending), _MAX_BATCH)):
            step, ended_s = self._pending.popleft()
            added = request.steps.add()
            added.CopyFrom(step)
            added.age_s = max(now_s - ended_s, 0.0)
        return request

    def _on_report(self, report: StepReport) -> None:
        if report.step is None:
            return
        if len(self._pending) == _MAX_PENDING:
            metrics.TELEMETRY_DROPPED.inc()
        self._pending.append((report.step, report.ended_s))
