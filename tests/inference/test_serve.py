"""`gptjax serve` as a process of its own, asked by OpenAI's own client and by plain HTTP."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import openai
import pytest

from gptjax.inference import openai_protocol, scheduler
from gptjax.inference import server as serve
from gptjax.inference.decoder import Prompt
from gptjax.inference.detokenizer import Continuation
from gptjax.tokenizers.tokenizer import ByteTokenizer


@contextlib.contextmanager
def serving(workdir, *more):
    """(process, port) of a server that answers."""
    argv = [sys.executable, "-m", "gptjax", "serve", f"--workdir={workdir}", "--port=0", *more]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=environment)
    patience = threading.Timer(180, process.kill)
    patience.start()
    try:
        line = process.stdout.readline()
        patience.cancel()
        found = re.fullmatch(r"finished \(step 4\) answers on http://127\.0\.0\.1:(\d+)/v1\n", line)
        assert found, line + process.stderr.read()
        yield process, int(found[1])
    finally:
        patience.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(finished):
    with serving(finished, "--rows=2") as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, prompt="1 plus ", **more):
    return client.completions.create(**{"model": "finished", "prompt": prompt, "max_tokens": 8, "seed": 3} | more)


def post(server, body, path="/v1/completions", method="POST"):
    """(status, answer) of a request as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server[1], timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode())
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_models_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["finished"]
    assert client.models.retrieve("finished").id == "finished"
    with pytest.raises(openai.NotFoundError, match='The model "other" does not exist: this is finished'):
        client.models.retrieve("other")
    assert post(server, b"", "/health", "GET")[0] == 200


def test_it_answers_what_generate_prints(gptjax_main, finished, client):
    argv = ["generate", f"--workdir={finished}", "--prompt=1 plus ", "--max_tokens=8", "--seed=3", "--temperature=1"]
    code, out, _ = gptjax_main(*argv, "--num_samples=2")
    assert code == 0
    answer = ask(client, n=2, echo=True)
    printed = re.split("—+ sample .\n", out)[1:]
    assert [choice.text + "\n" for choice in answer.choices] == printed
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7 + answer.usage.completion_tokens)
    assert answer.usage.completion_tokens <= 16


def test_prompts_in_all_their_forms(client):
    text = ask(client).choices[0].text
    assert ask(client, [*b"1 plus "]).choices[0].text == text
    both = ask(client, ["1 plus ", "2 plus 3"], temperature=0)
    assert [c.text for c in both.choices] == [
        ask(client, p, temperature=0).choices[0].text for p in ("1 plus ", "2 plus 3")
    ]
    assert ask(client, [[*b"1 plus "], [*b"2"]]).choices[0].text == text
    assert ask(client, "", temperature=0).usage.prompt_tokens == 0


def test_a_stream_is_the_whole_in_pieces(client):
    whole = ask(client, ["1 plus ", "2"], n=2, max_tokens=20)
    texts, finishes = [""] * 4, [None] * 4
    options = {"include_usage": True}
    for chunk in ask(client, ["1 plus ", "2"], n=2, max_tokens=20, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_why_it_ends(client):
    free = ask(client, max_tokens=20)
    text = free.choices[0].text
    assert free.choices[0].finish_reason == "length" and free.usage.completion_tokens == 20
    cut = ask(client, max_tokens=20, stop=["\0\0", text[9:11]])
    assert cut.choices[0].text == text[: text.index(text[9:11])] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 20


def test_many_at_once_get_what_each_gets_alone(client):
    """Of two rows; and other numbers for each."""
    prompts = [f"{n} plus " for n in range(8)]
    kinds = [{"temperature": n % 3 / 2, "top_p": 1 - n % 2 / 4, "seed": n, "max_tokens": 5 + n} for n in range(8)]
    alone = [ask(client, prompt, **kind) for prompt, kind in zip(prompts, kinds, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda both: ask(client, both[0], **both[1]), zip(prompts, kinds, strict=True)))
    assert [a.choices[0].text for a in together] == [a.choices[0].text for a in alone]


@pytest.mark.parametrize("change, param, words", [
    ({"model": "gpt-4"}, "model", "model='gpt-4' is unknown: ask for finished"),
    ({"prompt": "x" * 40}, "max_tokens", "prompt has 40 tokens, and the context of 32 takes at most 31"),
    ({"max_tokens": 99}, "max_tokens", "max_tokens=99 asks for more than the context of 32 holds: ask for at most 25"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ({"max_tokens": "8"}, "max_tokens", "max_tokens is '8'"),
    ({"max_tokens": True}, "max_tokens", "max_tokens is True"),
    ({"prompt": [1, -2]}, "prompt", "prompt is [1, -2]"),
    ({"prompt": [1, 900]}, "prompt", "prompt has token 900, and the vocabulary 257"),
    ({"prompt": ["a", 1]}, "prompt", "prompt is ['a', 1]"),
    ({"prompt": "\ud800"}, "prompt", "U+D800"),
    ({"temperature": float("nan")}, "temperature", "temperature is nan"),
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"top_p": 0}, "top_p", "top_p is 0"),
    ({"n": 1000}, "n", "n is 1000"),
    ({"n": 100, "prompt": ["a", "b"]}, "n", "2 prompts and n=100"),
    ({"stop": ["a", ""]}, "stop", "stop is"),
    ({"stream": "yes"}, "stream", "stream is 'yes'"),
    ({"logprobs": 3}, "logprobs", "not supported"),
    ({"temprature": 1}, "temprature", 'Did you mean "temperature"?'),
])  # fmt: skip
def test_bad_requests_are_told_why(server, change, param, words):
    status, answer = post(server, {"model": "finished", "prompt": "1 plus "} | change)
    error = answer["error"]
    assert status == (404 if param == "model" else 400) and error["param"] == param
    assert words in error["message"] and error["type"] and "\n" not in error["message"]


def test_a_prompt_opens_with_the_token_that_the_tokenizer_has_for_it():
    tokenizer = ByteTokenizer("")
    tokenizer.begin = 7
    asked = openai_protocol.parse(b'{"model": "m", "prompt": "ab", "echo": true}', "m", tokenizer, 32, 0)
    assert asked.prompts[0].ids == [7, 97, 98] and asked.echoed == ["ab"]


@pytest.mark.parametrize("asked, seq_len, given", [(0, 131072, 4096), (0, 1024, 1024), (8192, 131072, 8192)])
def test_memory_is_taken_for_a_long_context_only_where_it_is_asked_for(asked, seq_len, given):
    assert serve.context(asked, seq_len) == given


def test_what_is_no_request(server, client):
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        status, answer = post(server, body)
        assert status == 400 and "The request" in answer["error"]["message"]
    status, answer = post(server, b" " * (5 << 20))
    assert status == 413 and "4194304 bytes" in answer["error"]["message"]
    assert post(server, b"", "/v1/nothing", "GET")[0] == 404
    assert post(server, b"", "/v1/completions", "GET")[0] == 405
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        ask(client, logprobs=1)
    with pytest.raises(openai.NotFoundError, match="is unknown: ask for"):
        ask(client, model="other")
    assert ask(client).choices[0].text  # and it goes on


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_decoding(server, client, stream):
    """Long before all of 128 texts are made."""

    def load():
        return post(server, b"", "/health", "GET")[1]

    before = load()["tokens"]
    body = {"model": "finished", "prompt": "1 plus ", "n": 128, "max_tokens": 25, "temperature": 2, "stream": stream}
    gone = socket.create_connection(("127.0.0.1", server[1]))
    content = json.dumps(body).encode()
    gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    deadline = time.monotonic() + 60
    while not load()["decoding"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gone.close()
    while (now := load())["decoding"] or now["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 0 < now["tokens"] - before < 128 * 25 / 2


def test_who_gave_up_takes_no_place():
    """Nor do those who wait behind somebody: no row is free, and at the next look there is room for all again."""
    decoder = types.SimpleNamespace(rows=1, step=lambda rows, steps: {0: [97]}, begin=None)
    thread = scheduler.Batching(decoder, None, ByteTokenizer(""), None)
    prompts, number = [Prompt([256], 9, None, 0, 0)], scheduler.MAX_WAITING + 3
    jobs = [scheduler.Job(prompts, (), lambda news: None) for _ in range(number)]
    thread._rows = {0: (jobs[0], 0, Continuation(ByteTokenizer(""), 9))}
    assert all(thread.submit(job) for job in jobs[1:-2]) and not thread.submit(jobs[-2])
    for job in jobs[2:]:
        job.cancelled = True
    assert thread._look() and thread.load() == {"decoding": 1, "waiting": 1, "tokens": 1}
    assert thread.submit(jobs[-1])


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_it_at_once(finished, sign):
    """Also in the midst of a stream; and without a word."""
    with serving(finished, "--context=30") as (process, port):
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="the context of 30 holds: ask for at most 23"):
                ask(client, max_tokens=24)
            stream = ask(client, n=128, max_tokens=23, stream=True)
            next(iter(stream))
            process.send_signal(sign)
            began = time.monotonic()
            with contextlib.suppress(openai.APIError):
                for _ in stream:
                    pass
        out, error = process.communicate(timeout=30)
        assert process.returncode == 0 and time.monotonic() - began < 8
        assert out == "" and "Traceback" not in error, error


def test_refused(refused, finished):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(finished, "serve", f"--workdir={finished}", f"--port={port}")
    assert f"--host=127.0.0.1 --port={port} can't be listened to" in error
    assert "--port=99999" in refused(finished, "serve", f"--workdir={finished}", "--port=99999")
    error = refused(finished, "serve", f"--workdir={finished}", "--port=0", "--context=33")
    assert "--context=33 must be from 1 to the model's seq_len=32" in error
    assert "--rows=0" in refused(finished, "serve", f"--workdir={finished}", "--rows=0")
    assert "is not the workdir of a run" in refused(finished, "serve", f"--workdir={finished}/no", "--port=0")
