"""What single tokens stand for, for log-probabilities: the router is asked once for each id."""

from collections.abc import Iterable, Mapping

from ascendra import AsyncClient


class TokenBytes:
    """Bytes by model and token id. Bounded by the models' vocabularies."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._known: dict[str, dict[int, bytes]] = {}

    async def lookup(self, model: str, token_ids: Iterable[int]) -> Mapping[int, bytes]:
        """Return bytes that include those of these ids. Raises AscendraError."""
        known = self._known.setdefault(model, {})
        missing = sorted({token_id for token_id in token_ids if token_id not in known})
        if missing:
            known.update(zip(missing, await self._client.token_bytes(missing, model=model), strict=True))
        return known
