"""What no policy can exceed: engine seconds that requests cost at the very least, against the seconds there are.

A step of a step-time bin takes `k0 + sum over its tokens of their cost`. A step that decodes may not last longer than
the TBT objective, so its fixed part k0 is at least k0 / tbt of it; and a step of a bin with at most `max_tokens`
spreads k0 over at most that many tokens. So each token has a least cost, the smaller of its costs in either bin,
whatever step it is computed in, and what is served in time costs at least the sum over its tokens. A policy that must
keep a share of all requests does best by keeping the cheapest.

It says nothing of queueing, so it is loose for bursts, and it lets every step of every instance be of the best size.
Where prompts share beginnings, every block that came before is taken to be cached, wherever the request goes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.workloads import WorkloadRequest
from services.policy.prefix import PrefixIndex
from services.policy.step_time import StepTimeModel

if TYPE_CHECKING:
    from bench.options import Setting


def least_work_s(
    prompt_tokens: int,
    output_tokens: int,
    model: StepTimeModel,
    tbt_s: float,
    step_overhead_s: float = 0.0,
    cached_tokens: int = 0,
) -> float:
    """Return the engine seconds that a request costs at the least.

    Args:
        tbt_s: no step lasts longer.
        step_overhead_s: between two steps.
        cached_tokens: of the prompt, not computed.
    """
    new_tokens = prompt_tokens - cached_tokens
    chunk_tokens = prompt_tokens
    prefill_s, decode_s = [], []
    decodes = output_tokens - 1
    # Its contexts while it decodes: prompt + 1 ... prompt + decodes.
    contexts = decodes * prompt_tokens + decodes * (decodes + 1) / 2
    for bin in model.bins:
        fixed_s = bin.a0 + step_overhead_s
        if bin.max_tokens:
            stretch, per_token_s = 1.0, fixed_s / bin.max_tokens
            chunk_tokens = bin.max_tokens
        else:
            stretch, per_token_s = 1 / max(1 - fixed_s / tbt_s, 1e-9), 0.0
            chunk_tokens = max(int((tbt_s - fixed_s) / bin.prefill_token_s), 1)
        products = _least_products(new_tokens, chunk_tokens) + new_tokens * cached_tokens
        prefill_work_s = bin.prefill_token_s * new_tokens + bin.a5 * products
        prefill_s.append(stretch * prefill_work_s + per_token_s * new_tokens)
        decode_s.append(stretch * ((bin.a1 + bin.a3) * decodes + bin.a4 * contexts) + per_token_s * decodes)
    return min(prefill_s) + min(decode_s)


def _least_products(prompt_tokens: int, chunk_tokens: int) -> float:
    """Return the smallest sum of chunk tokens x tokens before, with chunks of at most so many tokens."""
    full, rest = divmod(prompt_tokens, chunk_tokens)
    return (prompt_tokens**2 - full * chunk_tokens**2 - rest**2) / 2


def works_s(setting: "Setting", workload: Sequence[WorkloadRequest]) -> list[float]:
    """Return each request's least work; steps may last as long as the loosest TBT objective allows."""
    tbt_s = max(slo_class.tbt_s for slo_class in setting.classes)
    truth, engine = setting.cluster.truth, setting.cluster.engine
    index = PrefixIndex(engine.block_tokens, sum(request.prompt_tokens for request in workload))
    works = []
    for request in workload:
        cached = 0
        if engine.prefix_caching:
            cached = index.cached_tokens(request.prefix_hashes, request.prompt_tokens)
            index.add(request.prefix_hashes, request.prompt_tokens)
        overhead_s = truth.overhead_s / truth.bias
        work_s = least_work_s(request.prompt_tokens, request.output_tokens, truth.model, tbt_s, overhead_s, cached)
        works.append(truth.bias * work_s)
    return works


def capacity_bound_rps(setting: "Setting", seed: int, target: float) -> float:
    """Return the rate at which serving the cheapest `target` share of a workload fills every instance."""
    works = sorted(works_s(setting, setting.workload(1.0, seed)))
    kept = works[: max(round(target * len(works)), 1)]
    return setting.cluster.instances / (sum(kept) / len(works))


def most_kept(
    works: Sequence[float], lengths: Sequence[int], available_s: float, longest_share: float = 0.0
) -> tuple[float, float]:
    """Return the largest shares of all requests, and of the longest tenth, that fit into some engine seconds.

    Args:
        works: least work of each request.
        lengths: prompt tokens of each.
        available_s: engine seconds.
        longest_share: share of the longest tenth of the prompts that must be kept.
    """
    order = sorted(range(len(works)), key=lengths.__getitem__)
    tenth = order[round(0.9 * len(order)) :]
    must = sorted(tenth, key=works.__getitem__)[: round(longest_share * len(tenth))]
    taken = set(must)
    left_s = available_s - sum(works[index] for index in must)
    for index in sorted(range(len(works)), key=works.__getitem__):
        if index not in taken and works[index] <= left_s:
            taken.add(index)
            left_s -= works[index]
    return len(taken) / len(works), len(taken.intersection(tenth)) / len(tenth)
