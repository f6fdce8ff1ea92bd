"""Waiting requests answered together: a queue and one thread for each kind of work.

While a batch is worked on the next one gathers, so no request waits for others to come, but for the few milliseconds of
`_GATHER_S`. Only the event loop's thread touches the queue.
"""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from latentwire.api.reading import WireReader

_GATHER_S = 0.002  # between the first request of a batch and its start
_CALL = object()  # the key of functions to call

T = TypeVar("T")


class FullError(Exception):
    """More would wait than may; again after `seconds`."""

    def __init__(self, name: str, waiting: int, seconds: int):
        super().__init__(f"{waiting} wait for {name} already; come back in {seconds} s")
        self.seconds = seconds


class ClosingError(Exception):
    """The service ends and takes no new work."""


class VanishedError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Job:
    """One item to work on. key: jobs of the same key may be worked on together; tell: called from the worker's thread
    with what is known of the result so far."""

    item: object
    key: Hashable
    tell: Callable[[str], None] | None = None
    future: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it: who vanished has cancelled the future."""
        return not self.future.done()


Work = Callable[[Hashable, Sequence[Job]], Sequence[object]]


class Batcher:
    """One kind of work. work(key, jobs), in a thread of its own: a result for each job. batch: jobs worked on together
    at most; queue: jobs that may wait; seen: told the size of each batch; size(item): what it takes of `room`, which a
    batch of several does not exceed."""

    def __init__(
        self,
        name: str,
        work: Work,
        batch: int,
        queue: int,
        seen: Callable[[int], None] = lambda size: None,
        size: Callable[[object], int] = lambda item: 0,
        room: int = 0,
    ):
        self.name, self._work, self._batch, self._queue, self._seen = name, work, batch, queue, seen
        self._size, self._room = size, room
        self._waiting: deque[Job] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._runner: asyncio.Task | None = None
        self.closing, self._seconds = False, 0.0  # what the last batch took

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return sum(job.wanted for job in self._waiting)

    def submit(
        self, key: Hashable, items: Sequence[object], tell: Callable[[str], None] | None = None
    ) -> list[asyncio.Future]:
        """A future for each item; it fails with what the work raised for that item alone. A cancelled one is dropped.

        Raises FullError where not all of them may wait, and then none does; ClosingError once `closing` is set.
        """
        if self.closing:
            raise ClosingError("the service is shutting down; ask another one")
        self._waiting = deque(job for job in self._waiting if job.wanted)
        if len(self._waiting) + len(items) > self._queue:
            batches = len(self._waiting) / self._batch
            raise FullError(self.name, len(self._waiting), max(1, math.ceil(batches * self._seconds)))
        jobs = [Job(item, key, tell) for item in items]
        self._waiting.extend(jobs)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run(), name=self.name)
        return [job.future for job in jobs]

    def call(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """What a function returns, called in the worker's thread when its turn comes. Raises as `submit` does."""
        return self.submit(_CALL, [function])[0]

    async def close(self) -> None:
        """Take no more, and return when what runs and what waits is finished."""
        self.closing = True
        if self._runner is not None:
            await asyncio.wait([self._runner])
        self._thread.shutdown()

    async def _run(self) -> None:
        """Work until nothing waits."""
        while self._waiting:
            if len(self._waiting) < self._batch:
                await asyncio.sleep(_GATHER_S)
            if jobs := self._taken():
                self._seen(len(jobs))
                begun = time.monotonic()
                await self._finish(jobs)
                self._seconds = time.monotonic() - begun

    def _taken(self) -> list[Job]:
        """The next batch: the first job that waits, and others of its key in their order, as far as there is room."""
        waiting = [job for job in self._waiting if job.wanted]
        alike = [job for job in waiting if job.key == waiting[0].key][: self._batch]
        sizes = itertools.accumulate(0 if job.key is _CALL else self._size(job.item) for job in alike)
        batch = alike[: max(1, sum(size <= self._room for size in sizes))]
        taken = set(batch)
        self._waiting = deque(job for job in waiting if job not in taken)
        return batch

    async def _finish(self, jobs: Sequence[Job]) -> None:
        """Results to their futures. Where a batch fails, each job is tried alone: its neighbours are not to blame."""
        work = _called if jobs[0].key is _CALL else self._work
        done = asyncio.wrap_future(self._thread.submit(work, jobs[0].key, jobs))
        await asyncio.wait([done])
        error = done.exception()
        if error and len(jobs) > 1:
            for job in jobs:
                if job.wanted:
                    await self._finish([job])
            return
        for job, result in zip(jobs, [None] * len(jobs) if error else done.result(), strict=True):
            if job.wanted and error:
                job.future.set_exception(error)
            elif job.wanted:
                job.future.set_result(result)


def _called(_: Hashable, jobs: Sequence[Job]) -> list:
    return [job.item() for job in jobs]


async def results(futures: Sequence[asyncio.Future], receive: Callable[[], Awaitable[dict]]) -> list:
    """What the futures of one request hold. Raises the error of the first that failed, with its number where there are
    several, and VanishedError where the client went away; then the others are dropped."""
    try:
        await while_there(asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION), receive)
        for number, future in enumerate(futures, 1):
            error = future.exception() if future.done() else None
            if isinstance(error, ValueError) and len(futures) > 1:
                raise ValueError(f"item {number}: {error}") from error
            if error:
                raise error
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def while_there(waiting: Coroutine, receive: Callable[[], Awaitable[dict]]) -> object:
    """What is waited for, unless the client goes away first: VanishedError. receive: ASGI's, once the body is read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.create_task(waiting), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise VanishedError("the client went away")
        return work.result()
    finally:
        work.cancel()
        left.cancel()


def answers_of(reader: "WireReader") -> Work:
    """The work of one LLM. key: max_new_tokens; items: (wire, question)."""

    def work(most: int, jobs: Sequence[Job]) -> list[str]:
        wires, questions = zip(*(job.item for job in jobs), strict=True)
        with _heard(reader, jobs):
            return reader.answer(wires, questions, most)

    return work


@contextmanager
def _heard(reader: "WireReader", jobs: Sequence[Job]) -> Iterator[None]:
    """Inside, each job is told its answer so far whenever the LLM's greedy loop reads back the tokens that it has
    chosen, one a row; and the loop ends where nobody waits for any row.

    The loop itself is unchanged, so an answer that is listened to is the same as one that is not.
    """
    rows: list[list[int]] = [[] for _ in jobs]

    def so_far(ids: Sequence[int]) -> str:
        return reader.llm.text(ids).rstrip("\ufffd").strip()  # a sign may take several tokens

    def hear(_: object, given: tuple, __: object) -> None:
        if given[0].shape != (len(jobs), 1):  # not a step of the loop
            return
        if not any(job.wanted for job in jobs):
            raise VanishedError("nobody waits for these answers any more")
        for row, job, token in zip(rows, jobs, given[0][:, 0].tolist(), strict=True):
            row.append(token)
            if job.tell and job.wanted:
                job.tell(so_far(row))

    handle = reader.llm.embedding.register_forward_hook(hear)
    try:
        yield
    finally:
        handle.remove()
