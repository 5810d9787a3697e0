"""Counterfactual replay of a decision log."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import replay
from bench.replay import LogFormatError, Verdict, read_logs


def end(request_id: str, arrival_s: float, **changes: Any) -> dict[str, Any]:
    """The line that the router writes when a request ends."""
    line = {
        "request_id": request_id, "at_ms": 900.0, "kind": "end", "outcome": "finished", "arrival_s": arrival_s,
        "prompt_tokens": 500, "cached_prompt_tokens": 0, "output_tokens": 20, "max_tokens": 64, "slo_class": "chat",
        "ttft_slo_ms": 600.0, "tbt_slo_ms": 100.0, "ttft_ms": 120.0, "p99_gap_ms": 40.0, "relegated": False,
    }  # fmt: skip
    return line | changes


def write_log(path: Path, ends: list[dict[str, Any]]) -> Path:
    """Write a log with a placement, on one of two workers in turn, before each end."""
    lines = []
    for index, line in enumerate(ends):
        place = {"request_id": line["request_id"], "at_ms": 0.1, "kind": "place", "to": f"w{index % 2}", "from": ""}
        lines += [place, line]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_requests_are_read_back_from_their_ends(tmp_path: Path) -> None:
    """Arrivals start at 0, cached tokens cost nothing, unknown outputs are guessed, verdicts follow the objectives."""
    ends = [
        end("slow", 1007.0, p99_gap_ms=140.0, cached_prompt_tokens=480),
        end("fine", 1005.0, output_tokens=30),
        end("fine", 1006.0, ttft_ms=700.0),
        end("turned-away", 1008.0, outcome="refused", output_tokens=0, ttft_ms=None, max_tokens=8),
        end("left", 1009.0, outcome="cancelled", output_tokens=3),
        end("broken", 1010.0, outcome="worker_lost", output_tokens=25, ttft_slo_ms=None),
    ]
    recording = read_logs([write_log(tmp_path / "log", ends)])
    assert [(r.request_id, r.arrival_s, r.prompt_tokens, r.output_tokens) for r in recording.workload] == [
        ("fine", 0, 500, 30),
        ("fine#2", 1, 500, 20),
        ("slow", 2, 20, 20),
        ("turned-away", 3, 500, 8),
        ("left", 4, 500, 3),
        ("broken", 5, 500, 25),
    ]
    assert recording.verdicts == {
        "slow": Verdict.SLOW,
        "fine": Verdict.ATTAINED,
        "fine#2": Verdict.LATE,
        "turned-away": Verdict.REFUSED,
        "left": Verdict.CANCELLED,
        "broken": Verdict.LOST,
    }
    assert recording.workers == 2
    assert recording.decisions["slow"] == ("place", "end")


def test_another_policy_changes_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a burst of long and short prompts stock vLLM misses what Ascendra serves; table and JSON say which."""
    ends = [
        end(f"r{index}", index * 0.05, prompt_tokens=6000 if index % 6 == 0 else 300, ttft_slo_ms=1000.0)
        for index in range(60)
    ]
    log, out = write_log(tmp_path / "log", ends), tmp_path / "out.json"
    replay.main([str(log), "--recorded-policy", "vllm-2048-rr", "--policy", "ascendra-pool", "--out", str(out)])
    result = json.loads(out.read_text())
    same, other = (result["counts"][key].get("attained", 0) for key in ("same_policy", "other_policy"))
    assert result["counts"]["recorded"] == {"attained": 60}
    assert result["agreement"] == same / 60
    assert other > same + 10
    gained = [change for change in result["changes"] if change["other_policy"] == "attained"]
    lost = [change for change in result["changes"] if change["same_policy"] == "attained"]
    assert len(gained) - len(lost) == other - same
    shown = capsys.readouterr().out
    assert f"{len(result['changes'])} requests end differently: {len(gained)} attain only now" in shown
    assert gained[0]["request_id"] in shown


def test_the_same_policy_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is reported as a change comes from the policy alone."""
    log = write_log(tmp_path / "log", [end(f"r{index}", index * 0.1) for index in range(20)])
    replay.main([str(log), "--policy", "ascendra"])
    assert "0 requests end differently" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["not json\n", '{"kind": "end", "request_id": "a"}\n', "[]\n"])
def test_a_broken_line_is_named(tmp_path: Path, text: str) -> None:
    """The message names file and line."""
    log = tmp_path / "log"
    log.write_text(json.dumps(end("a", 1.0)) + "\n" + text)
    with pytest.raises(LogFormatError, match=r"log: line 2: "):
        read_logs([log])


def test_a_log_without_ends_is_refused(tmp_path: Path) -> None:
    """A log of decisions alone says nothing about what to simulate."""
    log = tmp_path / "log"
    log.write_text('{"request_id": "a", "kind": "place", "to": "w0"}\n')
    with pytest.raises(SystemExit, match="no request of the log has ended"):
        replay.main([str(log), "--policy", "ascendra"])
