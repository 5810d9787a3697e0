"""Who is let in."""

import pytest

from services.policy.admission import AdmissionAction, AdmissionPolicy, admit, waited_too_long
from services.policy.prefill import TtftEstimate
from services.policy.state import QueuedRequest, Slo

SLO = Slo(ttft_s=2.0, tbt_s=0.1)


@pytest.mark.parametrize(
    ("seconds", "waiting", "refuse", "age_s", "action"),
    [
        ([1.0, 9.0], 0, None, 0.0, AdmissionAction.ADMIT),
        ([1.9], 0, None, 0.5, AdmissionAction.RELEGATE),
        ([5.0], 0, None, 0.0, AdmissionAction.RELEGATE),
        ([5.0], 0, True, 0.0, AdmissionAction.REFUSE),
        ([40.0], 0, False, 0.0, AdmissionAction.REFUSE),
        ([1.0], 10_000, None, 0.0, AdmissionAction.REFUSE),
        ([], 0, None, 0.0, AdmissionAction.REFUSE),
    ],
)
def test_decisions(
    seconds: list[float], waiting: int, refuse: bool | None, age_s: float, action: AdmissionAction
) -> None:
    """Admitted when someone makes it, relegated or refused as asked otherwise, refused beyond the limits."""
    estimates = [TtftEstimate(s, s, 0.0) for s in seconds]
    decision = admit(SLO, estimates, waiting, AdmissionPolicy(), refuse, age_s)
    assert decision.action is action
    assert decision.reason
    assert (decision.retry_after_s > 0) == (action is AdmissionAction.REFUSE)


def test_retry_delay_is_how_late_it_would_be() -> None:
    """A request 3 s late is told to come back in 3 s."""
    policy = AdmissionPolicy(refuse_hopeless=True)
    assert admit(SLO, [TtftEstimate(5.0, 5.0, 0.0)], 0, policy).retry_after_s == pytest.approx(3.0)


def test_waits_have_an_end() -> None:
    """Only those that never started and waited beyond the limit and their objective are told to go."""
    queue = [
        QueuedRequest(request_id=name, arrival_s=arrival_s, prompt_tokens=1, slo=slo, started=started)
        for name, arrival_s, slo, started in [
            ("young", 20.0, SLO, False),
            ("old", 0.0, SLO, False),
            ("begun", 0.0, SLO, True),
            ("patient", 0.0, Slo(ttft_s=60.0, tbt_s=0.1), False),
        ]
    ]
    assert waited_too_long(queue, 31.0, AdmissionPolicy()) == ["old"]
    assert waited_too_long(queue, 31.0, AdmissionPolicy(max_wait_s=0)) == []
