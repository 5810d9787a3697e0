"""The predictor over a real socket."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest

from ascendra.v1 import common_pb2, predictor_pb2, predictor_pb2_grpc
from services.common.channels import open_channel
from services.common.grpc_server import start_grpc_server
from services.common.wire import model_from_proto, residuals_from_proto
from services.policy.step_time import A100_LLAMA3_8B, StepShape
from services.predictor.models import ModelStore
from services.predictor.servicer import PredictorServicer

Stub = Any
LIMIT_S = 30.0
T = TypeVar("T")


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    """A client of a running predictor."""
    servicer = PredictorServicer(ModelStore(max_workers=4, forget_after_s=600))

    def register(server: grpc.aio.Server) -> list[str]:
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server(servicer, server)
        return [predictor_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name]

    server = await start_grpc_server("127.0.0.1:0", register)
    publishing = asyncio.create_task(servicer.publish(0.05))
    async with open_channel(server.address) as channel:
        yield predictor_pb2_grpc.PredictorServiceStub(channel)
    servicer.close()
    publishing.cancel()
    await server.stop(0)


async def once(*messages: T) -> AsyncIterator[T]:
    """Send these messages and end the stream."""
    for message in messages:
        yield message


def telemetry(worker_id: str, steps: Iterable[common_pb2.StepTelemetry] = ()) -> predictor_pb2.ReportTelemetryRequest:
    """Return a message of a worker."""
    return predictor_pb2.ReportTelemetryRequest(worker_id=worker_id, incarnation="a", steps=steps)


def true_steps(count: int, slower: float = 2.0) -> list[common_pb2.StepTelemetry]:
    """Return steps of a machine so many times as slow as the profile, with 2% noise."""
    rng = random.Random(1)
    steps = []
    for number in range(1, count + 1):
        prefill, decodes = rng.randint(0, 1500), rng.randint(1, 60)
        shape = StepShape(prefill, decodes, decodes * 800, prefill * 300)
        steps.append(
            common_pb2.StepTelemetry(
                step=number,
                prefill_tokens=prefill,
                decodes=decodes,
                decode_context_tokens=decodes * 800,
                prefill_context_products=prefill * 300,
                step_s=slower * A100_LLAMA3_8B.step_s(shape) * math.exp(rng.gauss(0, 0.02)),
            )
        )
    return steps


def card_line(card: predictor_pb2.GetCardResponse, worker_id: str, slice: str) -> predictor_pb2.CardEntry:
    """Return one line of a card."""
    return next(entry for entry in card.entries if (entry.worker_id, entry.slice) == (worker_id, slice))


def outcome(worker_id: str, predicted_s: float, actual_s: float, queue_ahead_s: float = 1.0) -> predictor_pb2.Outcome:
    """Return what became of a prediction."""
    return predictor_pb2.Outcome(
        worker_id=worker_id,
        predicted_ttft_s=predicted_s,
        predicted_ttft_p50_s=predicted_s,
        actual_ttft_s=actual_s,
        queue_ahead_s=queue_ahead_s,
    )


async def assess_one(stub: Stub, **changes: object) -> predictor_pb2.AssessResponse:
    """Ask about three requests on two instances."""
    request = predictor_pb2.AssessRequest(
        assess_id=7,
        instances=[
            predictor_pb2.InstanceState(worker_id="w1", decodes=20, decode_context_tokens=20_000, min_tbt_s=0.1),
            predictor_pb2.InstanceState(worker_id="unknown"),
        ],
        home=[0, 0, -1],
        prompt_tokens=[4000, 3000, 100],
        age_s=[0.5, 0.2, 0.0],
        ttft_slo_s=[1.0, 2.0, 2.0],
        tbt_slo_s=[0.1, 0.1, 0.1],
    )
    for name, value in changes.items():
        request.ClearField(name)
        request.MergeFrom(predictor_pb2.AssessRequest(**{name: value}))  # type: ignore[arg-type]
    async with asyncio.timeout(LIMIT_S):
        call = stub.Assess(once(request))
        response: predictor_pb2.AssessResponse = await anext(aiter(call))
        return response


async def test_learned_model_reaches_watchers(stub: Stub) -> None:
    """A watcher gets a snapshot at once, then the model learned from telemetry, within 5% of the machine."""
    call = stub.WatchModels(predictor_pb2.WatchModelsRequest())
    try:
        async with asyncio.timeout(LIMIT_S):
            snapshots = aiter(call)
            first = await anext(snapshots)
            assert not first.workers
            response = await stub.ReportTelemetry(once(telemetry("w1", true_steps(1000))))
            assert response.steps == 1000
            async for snapshot in snapshots:
                assert snapshot.version > first.version
                if snapshot.workers and snapshot.workers[0].step_time.samples > 900:
                    break
    finally:
        call.cancel()
    (worker,) = snapshot.workers
    model = model_from_proto(worker.step_time)
    shape = StepShape(800, 30, 24_000, 240_000)
    assert model.step_s(shape) == pytest.approx(2 * A100_LLAMA3_8B.step_s(shape), rel=0.05)
    assert worker.confidence == predictor_pb2.CONFIDENCE_FITTED
    assert [one.name for one in residuals_from_proto(worker.residuals)] == ["idle", "busy", "saturated"]
    assert 0 <= worker.age_s < LIMIT_S


async def test_nonsense_telemetry_is_refused_and_harms_nothing(stub: Stub) -> None:
    """NaN, negative, absurd and empty steps are not counted, and the model stays that of the good ones."""
    good = true_steps(500)
    bad = [
        common_pb2.StepTelemetry(step=1, prefill_tokens=10, step_s=value)
        for value in (math.nan, math.inf, -1.0, 0.0, 1e9)
    ]
    bad += [
        common_pb2.StepTelemetry(step=2, step_s=0.1),
        common_pb2.StepTelemetry(step=3, prefill_tokens=2**32 - 1, decode_context_tokens=2**63, step_s=0.1),
    ]
    bad_model = common_pb2.StepTimeModel(format_version=1, bins=[common_pb2.StepTimeBin(a0=math.nan)])
    first = telemetry("w1", bad)
    first.warm_start.CopyFrom(bad_model)
    async with asyncio.timeout(LIMIT_S):
        response = await stub.ReportTelemetry(once(first, telemetry("w1", good), telemetry("w1", bad)))
        card = await stub.GetCard(predictor_pb2.GetCardRequest())
    assert response.steps == len(good)
    steps = card_line(card, "w1", "steps")
    assert steps.mape < 0.1
    assert "refused a step" in steps.note


async def test_telemetry_without_a_worker_id_is_refused(stub: Stub) -> None:
    """The status names the field."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ReportTelemetry(once(telemetry("", true_steps(1))))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "worker_id" in (caught.value.details() or "")


async def test_outcomes_calibrate_and_nonsense_is_not_counted(stub: Stub) -> None:
    """Late first tokens raise the stated bound; moved, relegated, unknown and impossible outcomes are left out."""
    rng = random.Random(2)
    good = [
        outcome("w1", 1.0, 1.5 * math.exp(rng.gauss(0, 0.05)), queue_ahead_s)
        for queue_ahead_s in (0.0, 0.2, 2.0)
        for _ in range(100)
    ]
    bad = [outcome("w1", math.nan, 1.0), outcome("w1", 1.0, -1.0), outcome("nobody", 1.0, 1.0)]
    moved, relegated = outcome("w1", 1.0, 9.0), outcome("w1", 1.0, 9.0)
    moved.moved = relegated.relegated = True
    async with asyncio.timeout(LIMIT_S):
        await stub.ReportTelemetry(once(telemetry("w1", true_steps(200))))
        before = await assess_one(stub)
        response = await stub.ReportOutcomes(
            once(predictor_pb2.ReportOutcomesRequest(router_id="r", outcomes=[*bad, *good, moved, relegated]))
        )
        assert response.outcomes == len(good)
        after = await assess_one(stub)
        card = await stub.GetCard(predictor_pb2.GetCardRequest())
    assert dict(card.left_out) == {"impossible": 2, "unknown_worker": 1, "moved": 1, "relegated": 1}
    assert after.ttft_p90_s[2] > 1.1 * before.ttft_p90_s[2]
    assert after.ttft_p50_s[2] > 1.1 * before.ttft_p50_s[2]
    for worker_id in ("w1", ""):
        saturated = card_line(card, worker_id, "saturated")
        assert saturated.samples == 100
        assert saturated.bias == pytest.approx(1 / 1.5 - 1, abs=0.05)


async def test_what_one_worker_teaches_bounds_the_predictions_of_another(stub: Stub) -> None:
    """Residuals are pooled: a worker that nothing was seen of yet is predicted with those of its peers."""
    late = [outcome("w1", 1.0, 2.0, queue_ahead_s) for queue_ahead_s in (0.0, 0.2, 2.0) for _ in range(100)]
    async with asyncio.timeout(LIMIT_S):
        for worker_id in ("w1", "w2"):
            await stub.ReportTelemetry(once(telemetry(worker_id, true_steps(200))))
        await stub.ReportOutcomes(once(predictor_pb2.ReportOutcomesRequest(router_id="r", outcomes=late)))
        snapshots = aiter(stub.WatchModels(predictor_pb2.WatchModelsRequest()))
        workers = {worker.worker_id: worker for worker in (await anext(snapshots)).workers}
    assert set(workers) == {"w1", "w2"}
    for residual in residuals_from_proto(workers["w2"].residuals):
        assert residual.ratio(0.9) == pytest.approx(2.0, rel=0.15)


async def test_assess_answers_in_columns(stub: Stub) -> None:
    """Every column is row-major over requests and instances, and says what a reader would expect."""
    await stub.ReportTelemetry(once(telemetry("w1", true_steps(200))))
    response = await assess_one(stub)
    assert response.assess_id == 7
    columns = [f.name for f in response.DESCRIPTOR.fields if f.name not in ("assess_id", "confidence", "model_age_s")]
    assert all(len(getattr(response, name)) == 6 for name in columns)
    assert list(response.confidence) == [predictor_pb2.CONFIDENCE_FITTED, predictor_pb2.CONFIDENCE_PRIOR]
    assert response.model_age_s[0] < LIMIT_S
    assert response.model_age_s[1] == math.inf
    # The first cannot make its deadline where it waits; the short third one makes its own on the idle instance.
    assert response.miss_ttft[0] > 0.9
    assert response.miss_ttft[5] < 0.05
    assert response.laxity_s[5] == pytest.approx(2.0 - response.ttft_mean_s[5], abs=1e-5)
    assert all(a <= b for a, b in zip(response.ttft_p50_s, response.ttft_p90_s, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("home", [0, 0, 2]),
        ("home", [0, 0]),
        ("age_s", [0.0, math.nan, 0.0]),
        ("ttft_slo_s", [-1.0, 1.0, 1.0]),
        ("value_function", "lifo"),
        ("relegation", "dice"),
    ],
)
async def test_assess_refuses_wrong_questions(stub: Stub, field: str, value: object) -> None:
    """The status names the field that is wrong."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await assess_one(stub, **{field: value})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")


async def test_memory_is_bounded_by_the_number_of_workers(stub: Stub) -> None:
    """More workers than fit push out the longest silent."""
    for number in range(6):
        await stub.ReportTelemetry(once(telemetry(f"w{number}", true_steps(2))))
    card = await stub.GetCard(predictor_pb2.GetCardRequest())
    assert sorted({entry.worker_id for entry in card.entries}) == ["", "w2", "w3", "w4", "w5"]
