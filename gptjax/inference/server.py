"""A server of OpenAI's completions protocol: Starlette for HTTP, uvicorn for sockets, one decoding thread."""

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator

import jax
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptjax.errors import Failed, Refused
from gptjax.inference import openai_protocol
from gptjax.inference.decoder import Decoder
from gptjax.inference.model import Run
from gptjax.inference.openai_protocol import Answer, Bad, Completion
from gptjax.inference.scheduler import Batching, Job, News

CONTEXT = 4096  # default tokens of a row: 8 rows of Llama 3.1 8B with all 131,072 would take 137 GB
LAST_SECONDS = 3.0  # grace for the decoding thread, which may be compiling


class Server(uvicorn.Server):
    """Ends at SIGINT and SIGTERM, once, with exit code 0; decoding ends too."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.batching: Batching | None = None

    def handle_exit(self, *_) -> None:
        self.should_exit = True
        self.batching.stop()


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket, before anything is loaded. Raises: Refused, if the address is not free or unknown."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"--host={host} --port={port} can't be listened to ({reason}): give another.") from error


def context(asked: int, seq_len: int) -> int:
    """The tokens of a row: `asked`, or else the model's context up to CONTEXT. Raises: Refused."""
    if not 0 <= asked <= seq_len:
        raise Refused(f"--context={asked} must be from 1 to the model's seq_len={seq_len}; 0 is {CONTEXT} at most.")
    return asked or min(seq_len, CONTEXT)


def serve(run: Run, name: str, where: socket.socket, rows: int, context: int) -> None:
    """Answers requests until a signal comes. Raises: Failed, if decoding fails.

    Args:
      run: the model.
      name: the model's name in the protocol.
      where: the socket.
      rows: texts that are decoded at once; their memory is taken at the start.
      context: tokens of each text.
    """
    host, port = where.getsockname()[:2]
    server = Server(uvicorn.Config(None, log_level="warning", timeout_graceful_shutdown=1, lifespan="off"))
    failed = []

    def fail() -> None:
        failed.append(True)
        server.should_exit = True

    with jax.set_mesh(run.mesh):
        decoder = Decoder(run.model, run.tokenizer, rows, context)
    batching = server.batching = Batching(decoder, run.mesh, run.tokenizer, fail)
    batching.warm_up()
    batching.start()
    server.config.app = app(run, name, batching, context)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"{name} (step {run.step}) answers on {address}", flush=True)
    server.run(sockets=[where])
    batching.stop()
    batching.join(LAST_SECONDS)
    if failed:
        raise Failed("Decoding failed with the error above: start the server again.")
    if batching.is_alive():
        os._exit(0)  # there is nothing to save, and Python would wait for XLA to compile


def app(run: Run, name: str, batching: Batching, context: int) -> Starlette:
    """The application: a function for each path."""
    started = int(time.time())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"} | batching.load())

    described = {"id": name, "object": "model", "created": started, "owned_by": "gptjax"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described]})

    async def model(request: Request) -> Response:
        if request.path_params["model"] != name:
            raise Bad(f'The model "{request.path_params["model"][:200]}" does not exist: this is {name}.', status=404)
        return JSONResponse(described)

    async def completions(request: Request) -> Response:
        body = await content(request)
        seed = secrets.randbits(32)
        asked = await run_in_threadpool(openai_protocol.parse, body, name, run.tokenizer, context, seed)
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def notify(each: News | None) -> None:
            with contextlib.suppress(RuntimeError):  # if the loop ended before the decoding thread
                loop.call_soon_threadsafe(news.put_nowait, each)

        job = Job(asked.prompts, asked.stop, notify)
        if not batching.submit(job):
            raise Bad("The server has no room for more requests: try again later.", status=429)
        if asked.stream:
            return StreamingResponse(streamed(asked, job, news), media_type="text/event-stream")
        return await whole(request, asked, job, news)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{model}", model),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        exception_handlers={Bad: refused, HTTPException: no_such_path},
    )


async def content(request: Request) -> bytes:
    """Reads the body of a request. Raises: Bad, if the body is too large or cut short."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > openai_protocol.MAX_BYTES:
                raise Bad(f"The request has more than {openai_protocol.MAX_BYTES} bytes: send less.", status=413)
            parts.append(part)
    except ClientDisconnect as error:
        raise Bad("The request ended before its body did: send all of it.") from error
    return b"".join(parts)


async def streamed(asked: Completion, job: Job, news: asyncio.Queue) -> AsyncIterator[bytes]:
    """The answer as server-sent events. When the stream ends, also because the client left, decoding ends."""
    answer, open_rows, made = Answer(asked), len(asked.prompts), [0] * len(asked.prompts)
    try:
        for index, text in enumerate(asked.echoed):
            if text:
                yield openai_protocol.event(answer.choices((index, text, "")))
        while open_rows:
            each = await news.get()
            if each is None:
                yield openai_protocol.event(ended().body)
                return
            made[each.index] = each.tokens
            open_rows -= bool(each.finish)
            yield openai_protocol.event(answer.choices((each.index, each.text, each.finish)))
        if asked.usage:
            yield openai_protocol.event(answer.choices() | answer.usage(sum(made)))
        yield openai_protocol.event("[DONE]")
    finally:
        job.cancelled = True


async def whole(request: Request, asked: Completion, job: Job, news: asyncio.Queue) -> Response:
    """The answer in one piece. If the client leaves before, decoding ends."""
    texts, finishes, made = asked.echoed, [""] * len(asked.prompts), [0] * len(asked.prompts)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        news.put_nowait(None)

    watching = asyncio.create_task(watch())
    try:
        while not all(finishes):
            each = await news.get()
            if each is None:
                raise ended()
            texts[each.index] += each.text
            finishes[each.index], made[each.index] = each.finish, each.tokens
    finally:
        job.cancelled = True
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    answer = Answer(asked)
    choices = answer.choices(*zip(range(len(texts)), texts, finishes, strict=True))
    return JSONResponse(choices | answer.usage(sum(made)))


def ended() -> Bad:
    return Bad("The server ends: ask again when it is back.", status=503)


async def refused(request: Request, bad: Bad) -> Response:
    return JSONResponse(bad.body, bad.status)


async def no_such_path(request: Request, error: HTTPException) -> Response:
    bad = Bad(f"{request.method} {request.url.path[:200]}: {error.detail}.", status=error.status_code)
    return JSONResponse(bad.body, bad.status, headers=error.headers)
