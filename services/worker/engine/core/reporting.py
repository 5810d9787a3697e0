"""Sends step reports to the front end without ever waiting for it."""

import socket

from services.worker.engine.contract import StepReport


class ReportSocket:
    """A non-blocking datagram socket: telemetry that cannot be sent is dropped, news of requests is sent later."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._unsent = StepReport()

    def send(self, report: StepReport) -> None:
        """Send a report together with the news of those that could not be sent."""
        unsent = self._unsent
        report.started[:0] = unsent.started
        report.relegated[:0] = unsent.relegated
        report.preempted[:0] = unsent.preempted
        report.kv_failed[:0] = unsent.kv_failed
        try:
            self._socket.sendto(report.encode(), self._path)
        except OSError:  # the front end is slow (EAGAIN) or gone; neither may stop the engine
            self._unsent = StepReport(
                started=report.started,
                relegated=report.relegated,
                preempted=report.preempted,
                kv_failed=report.kv_failed,
            )
        else:
            if unsent.started or unsent.relegated or unsent.preempted or unsent.kv_failed:
                self._unsent = StepReport()
