"""Engine steps as JSON lines in a file: what each computed and how long it took, on the host's monotonic clock."""

from services.common.line_log import LineLog
from services.worker import metrics
from services.worker.engine.contract import StepReport


class StepLog:
    """Writes the steps that the engine reports; without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Open the file for appending. Raises OSError."""
        self._lines = LineLog(path, "step-log", metrics.STEP_LOG_DROPPED.inc)

    def close(self) -> None:
        """Write what is pending and close the file; waits two seconds at most."""
        self._lines.close()

    def note(self, report: StepReport) -> None:
        """Append the step of a report, if it has one; dropped and counted when the disk cannot follow."""
        step = report.step
        if step is None:
            return
        self._lines.append(
            {
                "ended_s": report.ended_s,
                "step": step.step,
                "step_s": step.step_s,
                "prefill_tokens": step.prefill_tokens,
                "decodes": step.decodes,
                "decode_context_tokens": step.decode_context_tokens,
                "prefill_context_products": step.prefill_context_products,
                "token_budget": step.token_budget,
                "waiting": step.waiting,
                "running": step.running,
                "queued_prefill_tokens": step.queued_prefill_tokens,
                "preempted": step.preempted,
                "kv_usage": step.kv_usage,
            }
        )
