"""The blocking twin of `AsyncClient`, for scripts and threads."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar, Unpack

from ascendra.client import DEFAULT_CONTROL_TIMEOUT_S, DEFAULT_TIMEOUT_S, AsyncClient
from ascendra.endpoints import Addresses, Credentials, closed_error
from ascendra.errors import UnavailableError
from ascendra.retry import RetryPolicy
from ascendra.types import Chunk, Completion, Message, RequestOptions, Role
from ascendra.v1 import cluster_pb2, inference_pb2

_T = TypeVar("_T")
_CANCELLATION_S = 2.0


class Client:
    """Talks to one router or several from ordinary code; may be shared by threads.

    The calls are those of `AsyncClient`. They run on one background event loop, which all clients of the process
    share: gRPC wants no more than one. Do not use it in a process that has an event loop of its own for gRPC.

    Example:
        with Client("127.0.0.1:7100") as client:
            print(client.generate("Once upon a time").text)
    """

    def __init__(
        self,
        addresses: Addresses,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        control_timeout_s: float = DEFAULT_CONTROL_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        credentials: Credentials | None = None,
        api_key: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Make a client; the arguments are those of `AsyncClient`."""
        self._client = AsyncClient(
            addresses,
            timeout_s=timeout_s,
            control_timeout_s=control_timeout_s,
            retry=retry,
            credentials=credentials,
            api_key=api_key,
            metadata=metadata,
        )
        self._loop = _LoopThread.acquire()
        self._closing = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls in flight, in other threads, end with an UnavailableError, as do later ones."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._loop.run(self._client.close())
        _LoopThread.release()

    def generate(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Completion:
        """Return one completion; as `AsyncClient.generate`."""
        return self._loop.run(self._client.generate(prompt, **options))

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Generator[Chunk]:
        """Yield a completion as it is generated; as `AsyncClient.stream`."""
        chunks = self._client.stream(prompt, **options)
        try:
            while (chunk := self._loop.run(_next(chunks))) is not None:
                yield chunk
        finally:
            self._loop.end(chunks)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        model: str = "",
        skip_special_tokens: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the token ids of a text or a conversation."""
        call = self._client.tokenize(
            text,
            messages=messages,
            model=model,
            skip_special_tokens=skip_special_tokens,
            continue_final_message=continue_final_message,
        )
        return self._loop.run(call)

    def token_bytes(self, token_ids: Sequence[int], *, model: str = "") -> list[bytes]:
        """Return the bytes of each token by itself."""
        return self._loop.run(self._client.token_bytes(token_ids, model=model))

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Return the text of token ids."""
        return self._loop.run(self._client.detokenize(token_ids, model=model))

    def models(self) -> list[inference_pb2.Model]:
        """Return the models that the router serves."""
        return self._loop.run(self._client.models())

    def status(self) -> cluster_pb2.GetStatusResponse:
        """Return the cluster as one router sees it."""
        return self._loop.run(self._client.status())

    def watch_status(self, interval_s: float = 1.0) -> Generator[cluster_pb2.GetStatusResponse]:
        """Yield the cluster as one router sees it, every interval_s seconds, until it fails."""
        statuses = self._client.watch_status(interval_s)
        try:
            while (status := self._loop.run(_next(statuses))) is not None:
                yield status
        finally:
            self._loop.end(statuses)

    def explain(self, request_id: str, *, tenant: str = "") -> cluster_pb2.ExplainResponse:
        """Return the decisions about a request; as `AsyncClient.explain`."""
        return self._loop.run(self._client.explain(request_id, tenant=tenant))

    def set_role(self, worker_id: str, role: Role | str) -> Role:
        """Change a worker's role and return the one now in force."""
        return self._loop.run(self._client.set_role(worker_id, role))

    def drain(self, worker_id: str, *, timeout_s: float | None = None) -> int:
        """Stop placing on a worker and return how many requests it still has."""
        return self._loop.run(self._client.drain(worker_id, timeout_s=timeout_s))


async def _next(items: AsyncGenerator[_T]) -> _T | None:
    return await anext(items, None)


class _LoopThread:
    """An event loop in a thread, alive while a client uses it."""

    _shared: ClassVar["_LoopThread | None"] = None
    _users: ClassVar[int] = 0
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        # Nothing is begun after the stop. Reentrant, as the collector may end a generator while this thread holds it.
        self._beginning = threading.RLock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ascendra-client", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> "_LoopThread":
        """Return the shared loop, starting it for the first user."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._users += 1
            return cls._shared

    @classmethod
    def release(cls) -> None:
        """Stop the shared loop after its last user."""
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls._shared is not None:
                stopping, cls._shared = cls._shared, None
                stopping._stop()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the loop and wait for it; an interrupt of the wait cancels it, and waits for its end.

        Raises UnavailableError when the loop is stopped, before or meanwhile.
        """
        outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda task: self._settle(outcome, task))

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        try:
            with self._beginning:
                if self._stopped:
                    coroutine.close()
                    raise closed_error()
                self._loop.call_soon_threadsafe(begin)
            return outcome.result()
        except BaseException:
            if not outcome.done() and not self._stopped:
                # A generator that the coroutine advances can be closed only when the cancellation is through it.
                self._loop.call_soon_threadsafe(cancel)
                concurrent.futures.wait([outcome], _CANCELLATION_S)
            raise

    def end(self, items: AsyncGenerator[Any]) -> None:
        """Close an asynchronous generator, unless the end of the loop has done so."""
        with contextlib.suppress(UnavailableError):
            self.run(items.aclose())

    def _settle(self, outcome: "concurrent.futures.Future[_T]", task: "asyncio.Task[_T]") -> None:
        if task.cancelled():
            outcome.set_exception(closed_error() if self._stopped else asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(task.result())

    def _stop(self) -> None:
        with self._beginning:
            self._stopped = True
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        """Cancel what still runs, so that nobody waits for it for ever."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
