"""A thread that decodes for many requests: each gets rows of one batch as rows become free."""

import collections
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax

from gptjax.inference.decoder import Decoder, Prompt
from gptjax.inference.detokenizer import Continuation
from gptjax.inference.sampling import Sampling

STEPS = 4  # between two looks at new requests, cancelled requests and new text
MAX_WAITING = 256  # jobs


class News(NamedTuple):
    """New text of one row of a job."""

    index: int
    text: str
    finish: str  # as `Continuation.finish`
    tokens: int  # tokens of the row so far


class Job:
    """The prompts of one request.

    Args:
      prompts: each takes a row.
      stop: strings that end a row.
      notify: called by the decoding thread with News, or with None if the thread ends before the job does.
    """

    def __init__(self, prompts: list[Prompt], stop: tuple[str, ...], notify: Callable[[News | None], None]):
        self.prompts, self.stop, self.notify = prompts, stop, notify
        self.started, self.cancelled = 0, False  # prompts that have a row; whether nobody waits for the rest


class Batching(threading.Thread):
    """The decoding thread. Jobs get rows in turn, so a job with many prompts does not keep the others waiting."""

    def __init__(self, decoder: Decoder, mesh: jax.sharding.Mesh, tokenizer, failed: Callable[[], None]):
        super().__init__(name="decoding", daemon=True)
        self._decoder, self._mesh, self._tokenizer, self._failed = decoder, mesh, tokenizer, failed
        self._waiting: collections.deque[Job] = collections.deque()
        self._rows: dict[int, tuple[Job, int, Continuation]] = {}  # by row of the decoder
        self._changed = threading.Condition()
        self._stopping = False
        self._tokens = 0

    def submit(self, job: Job) -> bool:
        """Queues a job. Returns False if the queue is full or the thread stops."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._stopping:
                return False
            self._waiting.append(job)
            self._changed.notify()
        return True

    def load(self) -> dict[str, int]:
        """Counts of the rows being decoded, the jobs waiting for rows, and the tokens drawn so far."""
        return {"decoding": len(self._rows), "waiting": len(self._waiting), "tokens": self._tokens}

    def stop(self) -> None:
        """Ends the thread at the next look, and notifies the jobs that wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        try:
            with jax.set_mesh(self._mesh):
                while self._look():
                    pass
        except Exception:
            traceback.print_exc()
            self._failed()
        finally:
            with self._changed:
                self._stopping = True
                for job in {*self._waiting, *(job for job, _, _ in self._rows.values())}:
                    job.notify(None)

    def warm_up(self) -> None:
        """Compiles the programs of a first short prompt."""
        prompt = Prompt([self._tokenizer.begin], 2, Sampling(), 0, 0)
        with jax.set_mesh(self._mesh):
            self._decoder.begin({0: prompt})
            self._decoder.step([], STEPS)

    def _look(self) -> bool:
        """Drops cancelled rows, starts new rows, and decodes all rows a few steps. Returns False to stop."""
        with self._changed:
            self._rows = {row: each for row, each in self._rows.items() if not each[0].cancelled}
            self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)
            while not (self._stopping or self._waiting or self._rows):
                self._changed.wait()
            if self._stopping:
                return False
            fresh = self._next_rows()
        if fresh:
            self._deliver(self._decoder.begin(fresh))
        if self._rows:  # all rows, because a row that a step leaves out is done
            self._deliver(self._decoder.step(list(self._rows), STEPS))
        return True

    def _next_rows(self) -> dict[int, Prompt]:
        """Gives free rows to waiting jobs in turn. Returns the prompts by row."""
        fresh = {}
        for row in (row for row in range(self._decoder.rows) if row not in self._rows):
            if not self._waiting:
                break
            job = self._waiting.popleft()
            prompt = fresh[row] = job.prompts[job.started]
            self._rows[row] = job, job.started, Continuation(self._tokenizer, prompt.max_tokens, job.stop)
            job.started += 1
            if job.started < len(job.prompts):
                self._waiting.append(job)
        return fresh

    def _deliver(self, made: dict[int, list[int]]) -> None:
        for row, tokens in made.items():
            job, index, continuation = self._rows[row]
            continuation.push(tokens)
            self._tokens += len(tokens)
            text = continuation.news()
            if text or continuation.finish:
                job.notify(News(index, text, continuation.finish, len(continuation.tokens)))
            if continuation.finish:
                del self._rows[row]
