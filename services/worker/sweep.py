"""What to run through an engine so that its step times show what they depend on: decodes, their context, prefills."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

_LONGEST_SETUP_STEPS = 32
"""Steps of prefill that a scene may need before all of its decodes run."""
_STEPS_PER_PREFILL = 3
_PREFILLS = 3
_SMALLEST_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine can take."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Requests that decode together, and prompts that arrive one by one meanwhile."""

    decodes: int
    context_tokens: int
    """Prompt of each request that decodes."""
    output_tokens: int
    """Tokens each of them generates: enough for the others to start and for the prompts to come."""
    prefills: tuple[int, ...]
    """Lengths of the prompts that arrive."""


def scenes(limits: Limits, seed: int = 0) -> Iterator[Scene]:
    """Yield the grid of scenes that fit the engine, shuffled, again and again with other prompts."""
    rng = random.Random(seed)
    grid = [(0, 0), *itertools.product(_decode_counts(limits), _contexts(limits))]
    while True:
        rng.shuffle(grid)
        for decodes, context_tokens in grid:
            scene = _scene(limits, decodes, context_tokens, rng)
            if fits(limits, scene):
                yield scene


def fits(limits: Limits, scene: Scene) -> bool:
    """Whether an engine has room for a scene, at a bearable effort to set it up."""
    longest = max(scene.context_tokens + scene.output_tokens if scene.decodes else 0, *scene.prefills) + 1
    resident = scene.decodes * (scene.context_tokens + scene.output_tokens) + max(scene.prefills)
    setup_tokens = scene.decodes * scene.context_tokens
    return (
        longest <= limits.max_model_len
        and scene.decodes < limits.max_num_seqs
        and resident <= 0.8 * limits.kv_capacity_tokens
        and setup_tokens <= _LONGEST_SETUP_STEPS * limits.max_num_batched_tokens
    )


def _scene(limits: Limits, decodes: int, context_tokens: int, rng: random.Random) -> Scene:
    longest = min(2 * limits.max_num_batched_tokens, limits.max_model_len - 1)
    span = math.log(longest / _SMALLEST_TOKENS)
    prefills = tuple(round(_SMALLEST_TOKENS * math.exp(rng.uniform(0, span))) for _ in range(_PREFILLS))
    setup_steps = math.ceil(decodes * context_tokens / limits.max_num_batched_tokens)
    return Scene(
        decodes=decodes,
        context_tokens=context_tokens,
        output_tokens=setup_steps + _STEPS_PER_PREFILL * (_PREFILLS + 1),
        prefills=prefills,
    )


def _decode_counts(limits: Limits) -> list[int]:
    return [1 << power for power in range(limits.max_num_seqs.bit_length())]


def _contexts(limits: Limits) -> list[int]:
    return [_SMALLEST_TOKENS << power for power in range(0, limits.max_model_len.bit_length(), 2)]
