"""What several routers say, as one picture."""

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2
from services.gateway.cluster_view import RouterView, Snapshot, as_plain

READY = cluster_pb2.WORKER_HEALTH_READY
CONNECTING = cluster_pb2.WORKER_HEALTH_CONNECTING


def view(*workers: cluster_pb2.WorkerStatus, **counters: int) -> RouterView:
    """Return one router's answer."""
    return RouterView("r", cluster_pb2.GetStatusResponse(router_id="r", workers=workers, counters=counters))


def worker(worker_id: str, health: cluster_pb2.WorkerHealth, **values: float) -> cluster_pb2.WorkerStatus:
    """Return one worker at the address of its name, in lower case."""
    status = cluster_pb2.WorkerStatus(worker_id=worker_id, address="a", health=health, model="m")
    for name, value in values.items():
        setattr(status, name, value)
    return status


def test_every_worker_is_counted_once() -> None:
    """Engines report the load of all routers: the freshest report of a worker stands for it."""
    old, new = worker("w", READY, running=1, age_s=2.0), worker("w", READY, running=5, waiting=3, age_s=0.1)
    dialling, unknown = worker("w", CONNECTING, running=9, age_s=0), worker("", CONNECTING)
    snapshot = Snapshot([view(old), view(new), view(dialling), view(unknown)])
    assert snapshot.workers == [new]
    assert snapshot.load_by_model() == {"m": (5, 3)}
    assert snapshot.ready


def test_without_a_ready_worker_nothing_is_ready() -> None:
    """A worker that is being dialled serves nobody, nor does a router that does not answer."""
    assert not Snapshot([view(worker("", CONNECTING))]).ready
    assert not Snapshot([RouterView("r", None, "no connection")]).ready
    assert Snapshot([RouterView("r", None, "no connection")]).as_json()["routers"] == [
        {"address": "r", "reachable": False, "error": "no connection"}
    ]


def test_counters_are_summed() -> None:
    """Routers count for themselves."""
    assert Snapshot([view(offloads=2), view(offloads=3, moves=1)]).as_json()["counters"] == {"offloads": 5, "moves": 1}


def test_messages_become_plain_data() -> None:
    """Enums have short names, absent messages are null, 64-bit numbers stay numbers."""
    plain = as_plain(
        cluster_pb2.ExplainResponse(
            request_id="x",
            receipt=inference_pb2.SloReceipt(
                pool=common_pb2.ROLE_HIGH_PRIORITY,
                seed=2**64 - 1,
                move_contract=common_pb2.MOVE_CONTRACT_EXACT,
                attempts=[inference_pb2.Attempt(number=1)],
            ),
        )
    )
    receipt = plain["receipt"]
    assert (receipt["pool"], receipt["seed"], receipt["move_contract"]) == ("high_priority", 2**64 - 1, "exact")
    assert receipt["target"] is None
    assert receipt["attempts"][0]["role"] == "unspecified"
    assert plain["decisions"] == []
    assert as_plain(cluster_pb2.ExplainResponse())["receipt"] is None
