"""Texts of single tokens, for log-probabilities: the router is asked once for each id."""

import asyncio
from collections.abc import Iterable

from ascendra import AsyncClient


class TokenTexts:
    """Texts by model and token id. Bounded by the models' vocabularies."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._texts: dict[str, dict[int, str]] = {}

    async def lookup(self, model: str, token_ids: Iterable[int]) -> dict[int, str]:
        """Return texts that include those of these ids. Raises AscendraError."""
        known = self._texts.setdefault(model, {})
        missing = sorted({token_id for token_id in token_ids if token_id not in known})
        if missing:
            texts = await asyncio.gather(*(self._client.detokenize([i], model=model) for i in missing))
            known.update(zip(missing, texts, strict=True))
        return known
