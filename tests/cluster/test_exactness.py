"""Requests moved at every kind of offset, on real vLLM, against the same requests unmoved."""

import pytest

from ascendra.v1 import common_pb2
from tests.cluster import exactness
from tests.support.cluster import Site
from tests.support.local_router import local_router
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


async def test_moved_requests_equal_unmoved_ones(site: Site) -> None:
    """100 prompts, all kinds of sampling, cut anywhere: token ids, text and finish reason are those of no move."""
    addresses = [site.fleet.address(worker_id) for worker_id in ("cpu-lp", "cpu-hp")]
    async with local_router(site.model, addresses, **exactness.ROUTER) as router:
        await router.attached(2)
        asked = exactness.cases(router.router.codec, VOCAB_SIZE, exactness.PROMPTS, seed=5)
        comparison = exactness.Comparison(router, seed=5)
        await comparison.run(asked, cuts_each=2)
        promised = await router.collect(asked[1].message("promised"))
    print(comparison.numbers())
    assert comparison.differences == []
    cells = [(kind, cut) for kind, row in comparison.table.items() for cut in row]
    assert {kind for kind, _ in cells} == set(exactness.SAMPLING)
    cuts = {cut for _, cut in cells}
    assert cuts == {"0", "1", "middle", "anywhere", "last token", "in a character", "in a stop string"}
    assert sum(cell.runs for cell in comparison.cells()) >= 2.2 * exactness.PROMPTS
    assert promised.accepted.move_contract == common_pb2.MOVE_CONTRACT_EXACT
