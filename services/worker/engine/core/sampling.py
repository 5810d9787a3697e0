"""Logits processors (model runner V1) that make sampling independent of where a request runs.

The noise of a sampled token depends on the request's seed and the token's absolute position only, and presence and
frequency penalties count the tokens that earlier attempts generated: a request continued elsewhere samples the very
tokens it would have sampled unmoved. CUDA's model runner V2 is keyed by position by itself and takes no such classes.
"""

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

STANDING_KEY = "ascendra"
"""Key of our data in SamplingParams.extra_args."""
_GREEDY_BELOW = 1e-5
_MASK_64 = (1 << 64) - 1


def noise_seed(seed: int, position: int) -> int:
    """Mix a request's seed and a token's absolute position into a generator seed (splitmix64), below 2**63."""
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return (mixed ^ (mixed >> 31)) >> 1


class PositionKeyedSampler(LogitsProcessor):
    """Chooses the token of seeded random rows itself and leaves only it possible."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[SamplingParams, int, int, list[int]]] = {}
        self._generator = torch.Generator()

    def is_argmax_invariant(self) -> bool:
        """True, so that it runs after penalties and temperature, on random rows only."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the batch."""
        process_dict_updates(self._rows, batch_update, _seeded_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw the token of each seeded row with noise keyed by its position."""
        for index, (params, seed, prompt_tokens, output) in self._rows.items():
            row = logits[index]
            weights = _truncated(row, params.top_k, params.top_p).softmax(-1)
            self._generator.manual_seed(noise_seed(seed, prompt_tokens + len(output)))
            chosen = (weights / torch.empty_like(weights).exponential_(generator=self._generator)).argmax()
            row.fill_(float("-inf"))
            row[chosen] = 0.0
        return logits


class ResumedPenalties(LogitsProcessor):
    """Applies presence and frequency penalties to tokens that earlier attempts generated (now part of the prompt)."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[SamplingParams, torch.Tensor, torch.Tensor, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it changes which token is likeliest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the batch."""
        process_dict_updates(self._rows, batch_update, _resumed_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Subtract what the sampler does not know of; it handles the tokens of this attempt."""
        for index, (params, ids, counts, output) in self._rows.items():
            row = logits[index]
            row[ids] -= params.frequency_penalty * counts.to(row.dtype)
            if params.presence_penalty:
                unseen = ids[~torch.isin(ids, torch.tensor(output, dtype=ids.dtype))] if output else ids
                row[unseen] -= params.presence_penalty
        return logits


def _standing(params: SamplingParams) -> dict[str, Any]:
    return (params.extra_args or {}).get(STANDING_KEY) or {}


def _seeded_row(
    params: SamplingParams, prompt: list[int] | None, output: list[int]
) -> tuple[SamplingParams, int, int, list[int]] | None:
    seed = _standing(params).get("seed")
    if seed is None or params.temperature < _GREEDY_BELOW:
        return None
    return params, int(seed), len(prompt or ()), output


def _resumed_row(
    params: SamplingParams, prompt: list[int] | None, output: list[int]
) -> tuple[SamplingParams, torch.Tensor, torch.Tensor, list[int]] | None:
    resumed = _standing(params).get("generated_tokens", 0)
    if not resumed or not prompt or not (params.presence_penalty or params.frequency_penalty):
        return None
    ids, counts = torch.tensor(prompt[-resumed:], dtype=torch.int64).unique(return_counts=True)
    return params, ids, counts, output


def _truncated(row: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return the row with everything outside top-k and the top-p nucleus at minus infinity."""
    if 0 < top_k < row.numel():
        row = row.masked_fill(row < row.topk(top_k).values[-1], float("-inf"))
    if top_p < 1.0:
        ordered, indices = row.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        row = row.masked_fill(
            torch.zeros_like(row, dtype=torch.bool).scatter(0, indices, before >= top_p), float("-inf")
        )
    return row
