"""Whatever a Submit holds, it becomes a request that is safe for the engine or is refused."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ascendra.v1 import worker_pb2
from services.common.errors import InvalidArgument
from services.worker.submission import engine_request
from tests.support.messages import messages
from tests.unit.worker.test_submission import INFO


@settings(max_examples=300, deadline=None)
@given(submit=messages(worker_pb2.Submit), guided=st.booleans())
def test_submit(submit: worker_pb2.Submit, guided: bool) -> None:
    """Ids stay below the vocabulary and tokens within the context; everything else names a field."""
    info = replace(INFO, guided_decoding=guided)
    try:
        request = engine_request(submit, info, "r1", now_s=50.0)
    except InvalidArgument as error:
        assert str(error)
        return
    assert 0 < len(request.token_ids) < info.max_model_len
    assert max(request.token_ids) < info.vocab_size
    assert 1 <= request.max_tokens <= info.max_model_len - len(request.token_ids)
    assert 0 <= request.min_tokens <= request.max_tokens
    assert 0 <= request.standing.generated_tokens < len(request.token_ids)
