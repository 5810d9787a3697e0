"""The systems that are compared, by name: Ascendra's variants and the baselines, each a composition of policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from bench.metrics import RequestRecord
from bench.simulator.card import PredictionCard
from bench.simulator.cluster import Cluster, ClusterConfig
from bench.simulator.instance import Instance
from bench.simulator.pulling import PullingRouter
from bench.simulator.router import (
    HeadroomPolicy,
    PlacingRouter,
    RebalancePolicy,
    RouterPolicy,
)
from bench.simulator.view import WorkerState
from bench.workloads import WorkloadRequest
from services.policy.late_binding import LateBindingPolicy
from services.policy.offload import OffloadPolicy
from services.policy.order import OrderPolicy
from services.policy.placement import COMPARED, PlacementPolicy
from services.policy.prefix import PrefixIndex
from services.policy.relegation import LATE, NONE
from services.policy.roles import RolePolicy, default_hp_count
from services.policy.state import InstanceView, Role
from services.policy.tickets import TicketPolicy
from services.policy.token_budget import DYNAMIC, STATIC, BudgetPolicy

_DYNAMIC = BudgetPolicy(kind=DYNAMIC)
_EDF_MH = OrderPolicy(value_function="edf")
_LLF_MH = OrderPolicy(value_function="llf")
_OFFLOAD = OffloadPolicy(caution=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to serve."""

    summary: str
    placement: str = "least_predicted_work"
    hp_fill: float = 1.0
    """As in PlacementPolicy; 0 under `roles`, as in the router."""
    compared: int = COMPARED
    """As in PlacementPolicy."""
    budget: BudgetPolicy = _DYNAMIC
    order: OrderPolicy | None = _EDF_MH
    """None: stock vLLM, in order of arrival, with the budget's `static_tokens` as `max_num_batched_tokens`."""
    hp_count: Callable[[int], int] | None = None
    """HP instances from the number of all; None: a unified pool."""
    offload: OffloadPolicy | None = None
    rescue: bool = False
    """Offload to any instance, not to HP alone."""
    tickets: TicketPolicy | None = None
    headroom: HeadroomPolicy | None = None
    rebalance: RebalancePolicy | None = None
    late_binding: LateBindingPolicy | None = None
    """Requests wait at the router; replaces the placement."""
    deadline_priority: bool = False
    roles: RolePolicy | None = None
    sees_prefixes: bool = True
    """Router and in-engine order know what prefix caches hold."""


_DISPATCH = {
    "rr": ("round_robin", "round robin"),
    "least": ("least_requests", "fewest requests"),
    "work": ("least_predicted_work", "least predicted work"),
    "p2c": ("power_of_two", "power of two choices"),
    "sticky": ("prefix_affine", "prefix owner until saturated"),
    "edf": ("least_requests", "deadline as priority, fewest requests"),
    "headroom": ("least_predicted_work", "best fit by predicted TTFT with SLO headroom"),
    "spread": ("least_predicted_work", "most predicted SLO headroom"),
    "rebalance": ("least_predicted_work", "least predicted work, waiting requests rebalanced by load"),
}
_HEADROOM = {"headroom": HeadroomPolicy(), "spread": HeadroomPolicy(pack=False)}


def _stock(dispatch: str, tokens: int = 512) -> System:
    placement, words = _DISPATCH[dispatch]
    return System(
        summary=f"vLLM, budget {tokens}, {words}",
        placement=placement,
        budget=BudgetPolicy(kind=STATIC, static_tokens=tokens),
        order=None,
        deadline_priority=dispatch == "edf",
        headroom=_HEADROOM.get(dispatch),
        rebalance=RebalancePolicy() if dispatch == "rebalance" else None,
    )


def _paper(value_function: str, tokens: int = 512) -> System:
    return System(
        summary=f"the paper's recipe: chunk {tokens}, static split, {value_function}, offload, tickets",
        placement="least_requests",
        budget=BudgetPolicy(kind=STATIC, static_tokens=tokens),
        order=OrderPolicy(value_function=value_function, relegation=NONE, pause_started=False),
        hp_fill=0.0,
        hp_count=default_hp_count,
        offload=OffloadPolicy(),
        tickets=TicketPolicy(),
    )


def _split(summary: str, order: OrderPolicy, **changes: object) -> System:
    base = System(
        summary=summary,
        placement="tbt_bins",
        order=order,
        hp_count=default_hp_count,
        offload=_OFFLOAD,
        tickets=TicketPolicy(),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


SYSTEMS: dict[str, System] = {
    "vllm-2048-rr": _stock("rr", 2048),
    "vllm-512-rr": _stock("rr"),
    "vllm-512-least": _stock("least"),
    "vllm-512-work": _stock("work"),
    "vllm-512-p2c": _stock("p2c"),
    "vllm-512-edf": _stock("edf"),
    "vllm-512-sticky": _stock("sticky"),
    "vllm-512-headroom": _stock("headroom"),
    "vllm-512-spread": _stock("spread"),
    "vllm-512-rebalance": _stock("rebalance"),
    "paper": _paper("llf"),
    "paper-sjf": _paper("sjf"),
    "unified-edf": System(
        summary="one pool, dynamic budget, deadline order", order=OrderPolicy(value_function="edf", relegation=NONE)
    ),
    "unified": System(summary="one pool, dynamic budget, deadline order, Moore-Hodgson relegation", order=_EDF_MH),
    "qoserve": System(
        summary="one pool, dynamic budget, hybrid order, eager relegation",
        order=OrderPolicy(value_function="hybrid", relegation=LATE),
    ),
    "ascendra": _split("LP/HP, offload, tickets, dynamic budget, Moore-Hodgson, deadline order", _EDF_MH),
    "ascendra-2hp": _split("the same with two HPs", _EDF_MH, hp_count=lambda _instances: 2),
    "ascendra-4hp": _split("the same with four HPs", _EDF_MH, hp_count=lambda _instances: 4),
    "ascendra-of-4": _split("the same, a placement predicts four instances, drawn at random", _EDF_MH, compared=4),
    "ascendra-of-64": _split("the same, a placement predicts up to 64", _EDF_MH, compared=64),
    "ascendra-llf": _split("the same with least laxity first", _LLF_MH),
    "ascendra-no-tickets": _split("the same without tickets", _EDF_MH, tickets=None),
    "ascendra-no-relegation": _split("the same without relegation", OrderPolicy(value_function="llf", relegation=NONE)),
    "ascendra-blind": _split("the same, blind to what prefix caches hold", _EDF_MH, sees_prefixes=False),
    "ascendra-elastic": _split("the same, HPs follow the offload pressure", _EDF_MH, roles=RolePolicy()),
    "ascendra-pool": System(
        summary="one pool: as unified, with TBT classes kept apart and rescue between all instances",
        placement="tbt_bins",
        offload=_OFFLOAD,
        rescue=True,
    ),
    "ascendra-pull": System(
        summary="late binding: instances pull from one ordered set", late_binding=LateBindingPolicy()
    ),
    "ascendra-pull-split": System(
        summary="late binding with LP/HP: HP takes what LP would miss, and on tickets",
        late_binding=LateBindingPolicy(),
        hp_count=default_hp_count,
        tickets=TicketPolicy(),
    ),
}


def system_named(name: str) -> System:
    """Return a system by name.

    `vllm-<budget>-<dispatch>` and `paper-<budget>` work for every static budget, to find a baseline's best one.

    Raises:
        KeyError: the name is unknown.
    """
    if name in SYSTEMS:
        return SYSTEMS[name]
    family, _, rest = name.partition("-")
    tokens, _, dispatch = rest.partition("-")
    if not tokens.isdecimal() or int(tokens) < 1:
        raise KeyError(name)
    if family == "paper" and not dispatch:
        return _paper("llf", int(tokens))
    if family == "vllm" and dispatch in _DISPATCH:
        return _stock(dispatch, int(tokens))
    raise KeyError(name)


def leaving_room(system: System, delivery_s: float) -> System:
    """Return the system with dynamic budgets that leave so much room in each gap for delivery; 0: as it is."""
    return replace(system, budget=replace(system.budget, delivery_s=delivery_s)) if delivery_s else system


@dataclass(slots=True)
class Run:
    """A finished simulation."""

    records: list[RequestRecord]
    events: int
    steps: int
    preemptions: int
    busy_share: float
    """Mean share of time that instances spent in steps, until the last event."""
    hp_instances: int
    gave_up: bool = False
    """The run ended early: more misses than it was to see through."""
    moves: int = 0
    refused_moves: int = 0
    ticket_moves: int = 0
    role_changes: list[tuple[float, int]] = field(default_factory=list)
    """(Time, number of HPs from then on)."""


def assemble(
    system: System,
    config: ClusterConfig,
    give_up_after: int | None = None,
    warmup: int = 0,
    card: PredictionCard | None = None,
) -> tuple[Cluster, PlacingRouter | PullingRouter]:
    """Return a system's simulated cluster and its router; arguments as of `simulate`."""
    high = system.hp_count(config.instances) if system.hp_count else 0
    engine = config.engine
    if system.order is None:
        engine = replace(
            engine,
            max_num_batched_tokens=system.budget.static_tokens,
            priority=system.deadline_priority,
        )
    budget = replace(system.budget, max_tokens=min(system.budget.max_tokens, engine.max_num_batched_tokens))
    sees_prefixes = system.sees_prefixes and engine.prefix_caching
    instances, states = [], []
    for index in range(config.instances):
        role = Role.UNIFIED if not high else Role.HIGH if index < high else Role.LOW
        instance = Instance(
            index,
            role,
            engine,
            config.believed,
            config.truth,
            system.order,
            None if system.order is None else budget,
            config.seed,
            config.learn and system.order is not None,
            sees_prefixes,
            config.hop_s,
            config.delivery,
        )
        instances.append(instance)
        view = InstanceView(
            worker_id=instance.worker_id,
            role=role,
            model=config.believed,
            kv_capacity_tokens=engine.kv_tokens,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            hop_s=2 * config.hop_s,
            prefixes=PrefixIndex(engine.block_tokens, engine.kv_tokens) if sees_prefixes else None,
        )
        states.append(WorkerState(index, view, budget))
    cluster = Cluster(config, instances, give_up_after, warmup)
    router: PlacingRouter | PullingRouter
    order = system.order or OrderPolicy(value_function="fcfs", relegation=NONE)
    if system.late_binding:
        router = PullingRouter(cluster, states, system.late_binding, order, system.tickets)
    else:
        policy = RouterPolicy(
            placement=PlacementPolicy(
                name=system.placement, hp_fill=0.0 if system.roles else system.hp_fill, compared=system.compared
            ),
            budget=budget,
            order=order,
            headroom=system.headroom,
            offload=system.offload,
            rescue=system.rescue,
            tickets=system.tickets,
            rebalance=system.rebalance,
            deadline_priority=system.deadline_priority,
            roles=system.roles,
        )
        router = PlacingRouter(cluster, states, policy, config.seed, card)
    return cluster, router


def simulate(
    system: System,
    workload: Sequence[WorkloadRequest],
    config: ClusterConfig,
    give_up_after: int | None = None,
    warmup: int = 0,
    card: PredictionCard | None = None,
) -> Run:
    """Serve a workload with a system on a simulated cluster.

    Args:
        give_up_after: end the run once more requests than this, the first `warmup` aside, are sure to have missed.
        warmup: requests, first to arrive, whose misses do not count.
        card: judges the router's predictions, where it places requests.
    """
    cluster, router = assemble(system, config, give_up_after, warmup, card)
    records = cluster.run(workload, router)
    instances = cluster.instances
    run = Run(
        records=records,
        events=cluster.events,
        steps=sum(instance.engine.steps for instance in instances),
        preemptions=cluster.preemptions,
        busy_share=sum(instance.busy_s for instance in instances) / max(len(instances) * cluster.now_s, 1e-9),
        hp_instances=system.hp_count(config.instances) if system.hp_count else 0,
        gave_up=cluster.gave_up,
    )
    if isinstance(router, PlacingRouter):
        run.moves, run.refused_moves, run.ticket_moves = router.moves, router.refused_moves, router.ticket_moves
        run.role_changes = router.role_changes
    return run
