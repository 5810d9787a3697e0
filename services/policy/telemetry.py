"""What a decider concludes from an instance's last report and from what it has sent there since."""

import math
from collections.abc import Iterable, Sequence

from services.policy.state import InstanceView, QueuedRequest, Slo

OTHERS = "~others"
"""Id of the entry that stands for what other routers have queued on an instance."""
INTO_ENGINE_S = 0.002
"""From an instance's front end into its engine: half of the requests are through by then."""
_ALL_INTO_ENGINE_S = 0.005
"""By then nearly all are; long prompts take a while."""


def note_counted(sent: Iterable[tuple[QueuedRequest, float]], began_s: float, hop_s: float) -> None:
    """Mark the requests that the report of a step's end counts: an engine takes requests in between two steps only.

    Call it for every report, before the news that came with it of who started in the step after that one.

    Args:
        sent: own requests whose prefill is not complete, and when each was sent.
        began_s: when the report left, less the length of its step.
        hop_s: round trip.
    """
    seen_s = began_s - hop_s - _ALL_INTO_ENGINE_S
    for queued, sent_s in sent:
        if queued.started or sent_s <= seen_s:
            queued.counted = True


def share_out_progress(sent: Iterable[QueuedRequest], queued_tokens: int, now_s: float) -> QueuedRequest | None:
    """Reconcile an instance's count of queued prefill tokens with a decider's own requests there.

    What of its unstarted and started requests is no longer queued was computed of the started ones, whose
    `computed_tokens` grow, those served first first. When more is queued than is left of them, earlier counts were read
    wrongly: they shrink again, those served last first. What is queued even beyond that belongs to others, for whom an
    entry is returned. Reconciling the same count again changes nothing.

    Args:
        sent: own requests whose prefill is not complete; those count that the report does.
        queued_tokens: prefill tokens that the instance reported.
    """
    known = [queued for queued in sent if queued.counted]
    done = sum([queued.remaining_tokens for queued in known]) - queued_tokens
    if done:
        started = sorted((queued for queued in known if queued.started), key=_turn, reverse=done < 0)
        for queued in started:
            if done > 0:
                tokens = min(done, queued.remaining_tokens - 1)  # its last chunk shows by its token
            else:
                tokens = max(done, 0 if queued.continued else -queued.computed_tokens)
            queued.computed_tokens += tokens
            done -= tokens
    if done >= 0:
        return None
    slo = Slo(ttft_s=1e6, tbt_s=math.inf)
    return QueuedRequest(request_id=OTHERS, arrival_s=now_s, prompt_tokens=-done, slo=slo, started=True)


def see_step(
    view: InstanceView,
    now_s: float,
    *,
    busy: bool,
    began_s: float,
    queued_tokens: int,
    sent: Sequence[QueuedRequest],
    first_sent_s: float,
) -> None:
    """Note in the view how far the running step will be when a request sent now arrives.

    Args:
        busy: the instance had work when it last reported: its step began then.
        began_s: when that report left, as seen from here.
        queued_tokens: prefill tokens that it reported.
        sent: own requests there without a token, first sent first: an idle instance starts at once with the first one.
        first_sent_s: when that one was sent.
    """
    since_report_s = now_s - began_s + view.hop_s
    # The step also took in who came during the one before.
    news_tokens = sum([queued.remaining_tokens for queued in sent if queued.started and not queued.counted])
    if busy:
        view.step_elapsed_s, view.step_queued_tokens = since_report_s, queued_tokens + news_tokens
    elif sent:
        view.step_elapsed_s = min(since_report_s, now_s - first_sent_s)
        view.step_queued_tokens = news_tokens or sent[0].remaining_tokens
    else:
        view.step_elapsed_s, view.step_queued_tokens = None, 0


def _turn(request: QueuedRequest) -> tuple[bool, bool, float]:
    """Sort as an instance serves those that it has started."""
    return not request.continued, request.relegated, request.deadline_s
