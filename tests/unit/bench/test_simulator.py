"""The simulated cluster: conservation, determinism, what each mechanism is there for, and its cost."""

import cProfile
import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.metrics import Outcome, attains, summarize
from bench.simulator.cluster import ClusterConfig
from bench.simulator.engine import Engine, EngineConfig
from bench.simulator.instance import Instance, StepReport, StepTimeTruth
from bench.simulator.request import SimRequest
from bench.simulator.scatter import SCORES, Scatter
from bench.simulator.systems import SYSTEMS, System, simulate
from bench.simulator.view import RoutedRequest, WorkerState
from bench.workloads import TraceRow, WorkloadRequest, make_workload, slo_set
from services.policy.order import OrderPolicy
from services.policy.prefill import NO_STEP
from services.policy.relegation import NONE
from services.policy.roles import RolePolicy
from services.policy.state import InstanceView, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepShape
from services.policy.token_budget import BudgetPolicy

CHAT = [TraceRow(None, 200 + 37 * (i % 90), 20 + 7 * (i % 40)) for i in range(360)]
BLOCK = 512
CACHING = EngineConfig(prefix_caching=True, block_tokens=BLOCK)
LOADS = {"light": 4.0, "heavy": 18.0}


def workload(rate_rps: float, requests: int = 150, slo: str = "1000/100", seed: int = 1) -> list[WorkloadRequest]:
    """Chat-like requests."""
    return make_workload(
        CHAT,
        arrivals="poisson",
        rate_rps=rate_rps,
        requests=requests,
        classes=slo_set(slo, lambda prompt: prompt / 1e4),
        seed=seed,
    )


def conversations(turns: int = 400, seed: int = 1) -> list[WorkloadRequest]:
    """Three turns a second, each of which repeats the prompt of its conversation before it and adds to it."""
    rng = random.Random(seed)
    told: list[tuple[int, ...]] = []
    requests = []
    for number in range(turns):
        if len(told) < 12 or rng.random() < 0.1:
            told.append(())
        place = rng.randrange(max(len(told) - 12, 0), len(told))
        told[place] += tuple(1000 * number + block for block in range(rng.randint(2, 5)))
        prompt_tokens = BLOCK * len(told[place]) - rng.randint(0, BLOCK - 1)
        requests.append(
            WorkloadRequest(
                request_id=f"r{number}",
                arrival_s=number / 3.2,
                prompt_tokens=prompt_tokens,
                output_tokens=rng.randint(20, 60),
                slo=Slo(ttft_s=0.5 + prompt_tokens / 1e4, tbt_s=0.2),
                prefix_hashes=told[place],
            )
        )
    return requests


def share(name: str, rate_rps: float, config: ClusterConfig, requests: int = 800, slo: str = "1000/100") -> float:
    """Joint attainment of one run."""
    records = simulate(SYSTEMS[name], workload(rate_rps, requests, slo), config).records
    return sum(map(attains, records)) / len(records)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_request_ends_with_all_its_tokens(name: str, load: str) -> None:
    """Whatever moves, is relegated or evicted: everybody gets every token, in order, after arrival."""
    requests = workload(LOADS[load])
    small = EngineConfig(kv_tokens=24_000, max_num_seqs=24)
    run = simulate(SYSTEMS[name], requests, ClusterConfig(instances=3, engine=small))
    assert len(run.records) == len(requests)
    for request, record in zip(requests, run.records, strict=True):
        assert record.outcome is Outcome.FINISHED
        assert len(record.token_times_s) == request.output_tokens
        assert list(record.token_times_s) == sorted(record.token_times_s)
        assert record.ttft_s > 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_prefix_caches_lose_no_token(name: str) -> None:
    """Whoever shares blocks, and whatever is evicted or moved: everybody gets every token, and no block is lost."""
    requests = conversations(150)
    config = ClusterConfig(instances=2, engine=replace(CACHING, kv_tokens=60 * BLOCK, max_num_seqs=24))
    run = simulate(SYSTEMS[name], requests, config)
    for request, record in zip(requests, run.records, strict=True):
        assert record.outcome in (Outcome.FINISHED, Outcome.REFUSED)
        if record.outcome is Outcome.FINISHED:
            assert len(record.token_times_s) == request.output_tokens
    assert sum(record.outcome is Outcome.FINISHED for record in run.records) > 100


def test_who_knows_the_prefix_caches_keeps_more() -> None:
    """Caches serve those who know of them: others give up long prompts that would cost little."""
    requests = conversations()

    def kept(name: str, engine: EngineConfig) -> float:
        records = simulate(SYSTEMS[name], requests, ClusterConfig(instances=2, engine=engine)).records
        return sum(map(attains, records)) / len(records)

    known = kept("ascendra", CACHING)
    assert known > 0.95
    assert known > 1.5 * kept("ascendra", EngineConfig())
    assert known > 1.5 * kept("ascendra-blind", CACHING)
    assert kept("vllm-512-rr", CACHING) < kept("vllm-512-sticky", CACHING)


def test_paused_requests_stand_in_nobodys_way() -> None:
    """Who cannot start for want of blocks that paused requests hold does not wait for ever: they go on."""
    truth = StepTimeTruth(model=A100_LLAMA3_8B, jitter_sigma=0.0)
    instance = Instance(
        0, Role.UNIFIED, EngineConfig(kv_tokens=12_000), A100_LLAMA3_8B, truth, OrderPolicy(relegation=NONE),
        BudgetPolicy(), seed=1,
    )  # fmt: skip
    begun = sim_request("begun", 6000, 5, ttft_s=9.0)
    instance.engine.add(begun)
    now_s = instance.start_step(0.0) or 0.0
    instance.finish_step(now_s)
    assert 0 < begun.computed_tokens < 6000
    # More urgent, and longer than what is free.
    instance.engine.add(sim_request("urgent", 11_000, 5, ttft_s=2.0))
    for _ in range(40):
        now_s = instance.start_step(now_s) or now_s
        if instance.step is not None:
            instance.finish_step(now_s)
    assert begun.generated_tokens > 0
    assert not instance.engine.waiting


@pytest.mark.parametrize("name", ["vllm-512-least", "ascendra", "ascendra-pull"])
def test_equal_seeds_give_equal_runs(name: str) -> None:
    """A run is a function of workload, system and configuration."""
    first, second = (simulate(SYSTEMS[name], workload(14.0), ClusterConfig(instances=3)).records for _ in range(2))
    assert [r.token_times_s for r in first] == [r.token_times_s for r in second]


def test_an_idle_cluster_takes_the_unloaded_time() -> None:
    """One request alone: hops, its prefill steps and overhead, nothing else."""
    truth = StepTimeTruth(model=A100_LLAMA3_8B, jitter_sigma=0.0, overhead_s=0.001)
    config = ClusterConfig(instances=2, truth=truth, hop_s=0.002)
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    request = WorkloadRequest(request_id="r", arrival_s=5.0, prompt_tokens=300, output_tokens=1, slo=slo)
    (record,) = simulate(SYSTEMS["unified"], [request], config).records
    c = A100_LLAMA3_8B.bins[0]
    assert record.ttft_s == pytest.approx(2 * 0.002 + c.a0 + 300 * (c.a1 + c.a2) + 0.001)


def constant(seconds: float) -> Scatter:
    """Return times that do not scatter."""
    return Scatter((seconds,) * len(SCORES))


def test_what_a_machine_adds_is_added() -> None:
    """Steps take what was measured beyond the model, and tokens their way to the caller, whatever the hop is."""
    truth = StepTimeTruth(model=A100_LLAMA3_8B, measured_excess=(constant(0.002), constant(0.005)))
    config = ClusterConfig(instances=1, truth=truth, hop_s=0.001, delivery=constant(0.007))
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    request = WorkloadRequest(request_id="r", arrival_s=5.0, prompt_tokens=300, output_tokens=2, slo=slo)
    (record,) = simulate(SYSTEMS["unified"], [request], config).records
    prefill_s = A100_LLAMA3_8B.step_s(StepShape(300))
    assert record.ttft_s == pytest.approx(0.001 + prefill_s + 0.005 + 0.007)
    gap_s = record.token_times_s[1] - record.token_times_s[0]
    assert gap_s == pytest.approx(A100_LLAMA3_8B.step_s(StepShape(0, 1, 301)) + 0.002)


def test_late_deliveries_do_not_overtake() -> None:
    """Delays of up to 200 ms: a caller's tokens come in order, none before the hop, and many gaps are lost."""
    late = Scatter(tuple(0.002 if score < 1 else 0.2 for score in SCORES))
    requests = workload(4.0, 60)
    plain, delayed = (
        simulate(SYSTEMS["unified"], requests, ClusterConfig(instances=2, delivery=delivery)).records
        for delivery in (None, late)
    )
    assert all(record.token_times_s == sorted(record.token_times_s) for record in delayed)
    assert sum(map(attains, delayed)) < sum(map(attains, plain)) == len(plain)
    # The engines do not know of it: they generate when they did.
    for one, other in zip(plain, delayed, strict=True):
        assert all(b >= a + 0.0009 for a, b in zip(one.token_times_s, other.token_times_s, strict=True))


def test_rooms_are_left_from_their_time_on() -> None:
    """A worker that is to leave 30 ms of room takes shorter steps from then on, and the router hears of it."""

    def longest_gaps_s(*rooms: tuple[float, tuple[float]]) -> list[float]:
        truth = StepTimeTruth(model=A100_LLAMA3_8B, jitter_sigma=0.0)
        config = ClusterConfig(instances=1, truth=truth, rooms=rooms)
        times_s = [record.token_times_s for record in simulate(SYSTEMS["unified"], workload(9.0, 300), config).records]
        gaps_s = [(end_s, end_s - start_s) for one in times_s for start_s, end_s in itertools.pairwise(one)]
        return [max(gap_s for end_s, gap_s in gaps_s if (end_s > 10.0) is late) for late in (False, True)]

    assert min(longest_gaps_s()) > 0.08
    before_s, after_s = longest_gaps_s((9.5, (0.03,)))
    assert before_s > 0.08 > 0.072 > after_s
    state = WorkerState(0, InstanceView(worker_id="w", role=Role.UNIFIED, model=A100_LLAMA3_8B), BudgetPolicy())
    state.take_in(StepReport(delivery_s=0.03), 1.0)
    assert state.budget.delivery_s == 0.03


def test_what_never_fits_is_refused() -> None:
    """A prompt larger than the KV cache is turned away instead of blocking the queue for ever."""
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    items = [
        WorkloadRequest(request_id=f"r{i}", arrival_s=0.1 * i, prompt_tokens=tokens, output_tokens=5, slo=slo)
        for i, tokens in enumerate((100, 5000, 100))
    ]
    config = ClusterConfig(instances=1, engine=EngineConfig(kv_tokens=1600))
    records = simulate(SYSTEMS["vllm-512-rr"], items, config).records
    assert [r.outcome for r in records] == [Outcome.FINISHED, Outcome.REFUSED, Outcome.FINISHED]


def test_what_is_not_done_at_the_end_is_unfinished() -> None:
    """The run ends a fixed time after the last arrival."""
    records = simulate(SYSTEMS["unified"], workload(50.0), ClusterConfig(instances=1, drain_s=2.0)).records
    report = summarize(records)
    assert report.unfinished > 0
    assert report.finished + report.unfinished == report.requests


def test_withdrawal_is_refused_once_started() -> None:
    """Only a request that no step has worked on can move."""
    engine = Engine(EngineConfig())
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    one, two = (
        SimRequest(
            request_id=name,
            arrival_s=0.0,
            prompt_tokens=600,
            input_tokens=600,
            total_tokens=600,
            output_tokens=3,
            slo=slo,
        )
        for name in ("one", "two")
    )
    engine.add(one)
    engine.add(two)
    engine.schedule(512)
    assert not engine.withdraw(one)
    assert engine.withdraw(two)
    assert not engine.waiting


def test_a_withdrawn_request_runs_once() -> None:
    """Moves happen under load and duplicate nothing (checked by token counts above); some race and are refused."""
    run = simulate(SYSTEMS["ascendra"], workload(16.0, 600), ClusterConfig(instances=3))
    assert run.moves > 0
    assert run.hp_instances == 1


def sim_request(name: str, prompt_tokens: int, output_tokens: int, ttft_s: float = 1.0) -> SimRequest:
    """A request that came at 1 s."""
    return SimRequest(
        request_id=name,
        arrival_s=1.0,
        prompt_tokens=prompt_tokens,
        input_tokens=prompt_tokens,
        total_tokens=prompt_tokens,
        output_tokens=output_tokens,
        slo=Slo(ttft_s=ttft_s, tbt_s=0.1),
    )


def test_an_evicted_stream_comes_before_new_requests() -> None:
    """Its reader waits in the midst of it: the deadline is that of its next token, as in the worker's scheduler."""
    truth = StepTimeTruth(model=A100_LLAMA3_8B)
    engine = EngineConfig(kv_tokens=272, max_num_seqs=8)
    instance = Instance(
        0, Role.UNIFIED, engine, A100_LLAMA3_8B, truth, OrderPolicy(relegation=NONE), BudgetPolicy(), seed=0
    )
    for name in ("one", "two"):
        instance.engine.add(sim_request(name, 96, 60, ttft_s=100.0))
    new = sim_request("new", 64, 2)
    admitted: list[str] = []
    now_s: float | None = 1.0
    while now_s is not None:
        step_ends_s = instance.start_step(now_s)
        if step_ends_s is not None:
            assert instance.step is not None
            admitted += [request.request_id for request in instance.step.admitted]
            evicted = bool(instance.step.preempted)
            instance.finish_step(step_ends_s)
            if evicted:
                instance.engine.add(new)
        now_s = step_ends_s
    assert admitted == ["one", "two", "two", "new"]


def test_the_router_knows_the_running_step() -> None:
    """A newcomer is predicted behind what is left of the step that runs, from reports and its own sends alone."""
    view = InstanceView(worker_id="w", role=Role.UNIFIED, model=A100_LLAMA3_8B, hop_s=0.002)
    state = WorkerState(0, view, BudgetPolicy())
    assert state.running(1.0) == NO_STEP
    sim = sim_request("r", 2000, 1)
    first = RoutedRequest.arrived(sim)
    state.add(first)
    first.submitted_s = 1.0
    whole_s = state.pace.alone_s(first)
    assert state.running(1.0 + 0.25 * whole_s).left_s == pytest.approx(0.75 * whole_s)
    newcomer = RoutedRequest.arrived(replace(sim, request_id="n"))
    assert state.ttft_s(newcomer, 1.0 + 0.25 * whole_s) == pytest.approx(view.hop_s + 1.75 * whole_s)


def test_the_default_budget_breaks_tight_gaps() -> None:
    """A budget of 2048 tokens loses 100 ms gaps where 512 keeps them."""
    config = ClusterConfig(instances=2)
    assert share("vllm-2048-rr", 7.0, config) < 0.5 < share("vllm-512-rr", 7.0, config)


def test_relegation_keeps_most_in_overload() -> None:
    """Beyond the knee, giving up few keeps most; order of arrival keeps next to nobody."""
    config = ClusterConfig(instances=2)
    assert share("unified", 12.0, config) > 1.5 * share("vllm-512-least", 12.0, config)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_single_instance_is_enough(name: str) -> None:
    """Nothing that a system does needs a second instance."""
    records = simulate(SYSTEMS[name], workload(6.0, 60), ClusterConfig(instances=1)).records
    assert all(record.outcome is Outcome.FINISHED for record in records)


def test_rescue_moves_between_peers() -> None:
    """Without any HP instance, a request that would miss where it waits still finds another."""
    assert simulate(SYSTEMS["ascendra-pool"], workload(22.0, 500), ClusterConfig(instances=3)).moves > 0


@pytest.mark.slow
def test_hps_follow_the_pressure_both_ways() -> None:
    """Workers that give nobody up: overload makes HPs of LPs, and keeps more so; when it is over they turn back."""
    heavy = workload(20.0, 600)
    light = [
        replace(item, request_id=f"l{item.request_id}", arrival_s=heavy[-1].arrival_s + 30.0 + item.arrival_s)
        for item in workload(4.0, 120)
    ]
    config = ClusterConfig(instances=4)
    fixed = replace(SYSTEMS["ascendra"], order=OrderPolicy(relegation=NONE))
    elastic = replace(fixed, roles=RolePolicy(hold_s=6.0, smooth_s=4.0))
    run = simulate(elastic, heavy + light, config)
    counts = [count for _, count in run.role_changes]
    assert counts == [2, 1]
    assert all(record.outcome is Outcome.FINISHED for record in run.records)

    def kept(system: System) -> int:
        """Of the overload, with three draws of step times: one alone scatters by 3%."""
        runs = (simulate(system, heavy, replace(config, seed=seed)) for seed in range(3))
        return sum(attains(record) for run in runs for record in run.records)

    assert kept(elastic) > 1.1 * kept(fixed)


def test_the_planner_learns_a_slower_machine() -> None:
    """Steps that take 1.3 times what the profile says are noticed: with learning, gaps hold."""
    slow = StepTimeTruth(model=A100_LLAMA3_8B, bias=1.3, jitter_sigma=0.08)
    config = ClusterConfig(instances=2, truth=slow)
    assert share("unified", 6.0, config) > share("unified", 6.0, replace(config, learn=False)) + 0.1


@pytest.mark.slow
def test_cost_does_not_depend_on_the_number_of_workers() -> None:
    """A request takes at 64 workers about the calls it takes at 8. Seconds, which bench.speed measures, are noisy."""

    def calls_per_request(instances: int) -> float:
        requests = workload(5.0 * instances, 20 * instances)
        profile = cProfile.Profile()
        profile.runcall(simulate, SYSTEMS["unified"], requests, ClusterConfig(instances=instances))
        return sum(entry.callcount for entry in profile.getstats()) / len(requests)

    assert calls_per_request(64) < 1.2 * calls_per_request(8)


@given(st.lists(st.booleans(), max_size=40))
def test_a_stream_knows_its_steps(made: list[bool]) -> None:
    """Whatever steps generated a token of it, in a row or not, its tokens have their times."""
    request = SimRequest(
        request_id="r", arrival_s=0, prompt_tokens=1, slo=Slo(ttft_s=1, tbt_s=0.1), output_tokens=9, input_tokens=1
    )
    times_s = [0.5 * step for step in range(len(made))]
    for step, has_token in enumerate(made):
        if has_token:
            if request.last_step != step - 1:
                request.begin_run(step)
            request.last_step = step
    assert request.token_times_s(times_s) == [time_s for time_s, has in zip(times_s, made, strict=True) if has]
