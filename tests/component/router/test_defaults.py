"""What a request leaves out is filled in as the model recommends."""

import json
from pathlib import Path

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2
from tests.support.local_router import cluster, text_request
from tests.support.scripted_worker import ScriptedWorker
from tests.support.tokenizer_files import write_byte_level


async def test_generation_config_fills_in_what_a_request_leaves_out(tmp_path: Path) -> None:
    """Temperature and penalties of generation_config.json reach the worker, unless the request has its own.

    What is filled in leaves the rest of the request alone, its class among it.
    """
    directory = write_byte_level(tmp_path / "tiny")
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "repetition_penalty": 1.1}))
    worker = ScriptedWorker()
    async with cluster(directory, worker) as router:
        await router.collect(
            inference_pb2.GenerateRequest(
                text="a", slo_class="interactive", sampling=common_pb2.SamplingParameters(max_tokens=2)
            )
        )
        await router.collect(text_request(max_tokens=2))
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    sent = [submit.sampling for submit in worker.submitted]
    assert [(round(one.temperature, 3), round(one.repetition_penalty, 3)) for one in sent] == [(0.6, 1.1), (0.0, 1.1)]
    assert {row.slo_class for row in status.attainment} == {"interactive", "default"}
