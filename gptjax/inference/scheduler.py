"""One thread that decodes for many: whoever asks gets rows of one batch, as they become free."""

import collections
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax

from gptjax.inference.decoder import Decoder, Prompt
from gptjax.inference.detokenizer import Continuation
from gptjax.inference.sampling import Sampling

STEPS = 4  # between two looks at who has come, who has gone, and what there is to tell
MAX_WAITING = 256  # jobs


class News(NamedTuple):
    """Of one row of a job."""

    index: int
    text: str
    finish: str  # as `Continuation.finish`
    tokens: int  # that the row has by now


class Job:
    """Prompts of one who asks, and what has been made of them.

    tell: called by the decoding thread, with News, or None where the thread ends before the job does.
    """

    def __init__(self, prompts: list[Prompt], stop: tuple[str, ...], tell: Callable[[News | None], None]):
        self.prompts, self.stop, self.tell = prompts, stop, tell
        self.begun, self.cancelled = 0, False


class Batching(threading.Thread):
    """The thread. Jobs get rows in turn, one by one, so that one of many prompts does not keep the others waiting."""

    def __init__(self, decoder: Decoder, mesh: jax.sharding.Mesh, tokenizer, failed: Callable[[], None]):
        super().__init__(name="decoding", daemon=True)
        self._decoder, self._mesh, self._tokenizer, self._failed = decoder, mesh, tokenizer, failed
        self._waiting: collections.deque[Job] = collections.deque()
        self._rows: dict[int, tuple[Job, int, Continuation]] = {}  # by row of the decoder
        self._changed = threading.Condition()
        self._stopping = False
        self._tokens = 0

    def submit(self, job: Job) -> bool:
        """Whether there is room for a job."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._stopping:
                return False
            self._waiting.append(job)
            self._changed.notify()
        return True

    def load(self) -> dict[str, int]:
        """Rows that are being decoded, jobs that wait for more, and the tokens made so far."""
        return {"decoding": len(self._rows), "waiting": len(self._waiting), "tokens": self._tokens}

    def stop(self) -> None:
        """Ends it at the next look; those who wait are told."""
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
                    job.tell(None)

    def warm_up(self) -> None:
        """Compiles what a first short prompt needs."""
        prompt = Prompt([self._tokenizer.begin], 2, Sampling(), 0, 0)
        with jax.set_mesh(self._mesh):
            self._decoder.begin({0: prompt})
            self._decoder.step([], STEPS)

    def _look(self) -> bool:
        """Ends rows that nobody wants any more, begins new ones, and goes on with all. Returns False to stop."""
        with self._changed:
            self._rows = {row: each for row, each in self._rows.items() if not each[0].cancelled}
            self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)
            while not (self._stopping or self._waiting or self._rows):
                self._changed.wait()
            if self._stopping:
                return False
            fresh = self._next_rows()
        if fresh:
            self._tell(self._decoder.begin(fresh))
        if self._rows:  # all of them, since a row that a step leaves out is done
            self._tell(self._decoder.step(list(self._rows), STEPS))
        return True

    def _next_rows(self) -> dict[int, Prompt]:
        """Free rows, and what they begin with."""
        fresh = {}
        for row in (row for row in range(self._decoder.rows) if row not in self._rows):
            if not self._waiting:
                break
            job = self._waiting.popleft()
            prompt = fresh[row] = job.prompts[job.begun]
            self._rows[row] = job, job.begun, Continuation(self._tokenizer, prompt.max_tokens, job.stop)
            job.begun += 1
            if job.begun < len(job.prompts):
                self._waiting.append(job)
        return fresh

    def _tell(self, made: dict[int, list[int]]) -> None:
        for row, tokens in made.items():
            job, index, continuation = self._rows[row]
            continuation.push(tokens)
            self._tokens += len(tokens)
            text = continuation.news()
            if text or continuation.finish:
                job.tell(News(index, text, continuation.finish, len(continuation.tokens)))
            if continuation.finish:
                del self._rows[row]
