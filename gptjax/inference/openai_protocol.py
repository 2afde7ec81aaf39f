"""OpenAI's completions protocol as plain data: the parameters of a request, and the objects of an answer."""

import json
import math
import time
import uuid
from typing import NamedTuple

from gptjax.errors import Refused, nearest, shown
from gptjax.inference.decoder import Prompt
from gptjax.inference.generate import check
from gptjax.inference.sampling import Sampling
from gptjax.runtime import untrusted
from gptjax.tokenizers.tokenizer import encode_prompt

MAX_BYTES = 4 << 20  # bytes of a request
MAX_TEXTS, MAX_STOPS = 128, 4
DEFAULT_TOKENS = 16  # OpenAI's default


class Bad(Exception):
    """A request that can't be answered: the message, the parameter to blame, and the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "not_found_error" if status == 404 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Completion(NamedTuple):
    """A checked request; each prompt is repeated `n` times."""

    model: str
    prompts: list[Prompt]
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # whether the stream ends with the counts
    echoed: list[str]  # the start of each choice's text


def number(low: float, high: float, whole: bool = False):
    """A check of a number from `low` to `high`, and the words of the error."""

    def fits(value) -> bool:
        kinds = (int,) if whole else (int, float)
        return type(value) in kinds and low <= value <= high and math.isfinite(value)

    return fits, f"{'an integer' if whole else 'a number'} from {low} to {high}"


def one_of(kind: type, what: str):
    return (lambda value: type(value) is kind), what


def nothing(*same):
    """A check of an unsupported parameter, which accepts only values that change nothing."""
    return (lambda value: value in same and type(value) is not bool), "left out, because it is not supported here"


ID = (1 << 31) - 1


def is_ids(value) -> bool:
    return type(value) is list and bool(value) and all(type(id) is int and 0 <= id <= ID for id in value)


def is_texts(value) -> bool:
    return type(value) is list and bool(value) and all(type(text) is str for text in value)


# Each parameter: the default, a check, and the words for "must be" in the error. A null counts as not given.
PARAMETERS = {
    "model": (None, *one_of(str, "a string")),
    "prompt": (
        "",
        lambda value: (
            type(value) is str
            or is_ids(value)
            or is_texts(value)
            or (type(value) is list and value and all(map(is_ids, value)))
        ),
        "a string, a list of token ids, or a list of strings or of such lists",
    ),
    "max_tokens": (DEFAULT_TOKENS, *number(1, ID, whole=True)),
    "temperature": (1.0, *number(0, 2)),
    "top_p": (1.0, lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0, up to 1"),
    "top_k": (0, *number(0, ID, whole=True)),
    "min_p": (0.0, *number(0, 1)),
    "repetition_penalty": (1.0, lambda value: type(value) in (int, float) and 0 < value <= 100, "above 0, up to 100"),
    "n": (1, *number(1, MAX_TEXTS, whole=True)),
    "stop": (
        [],
        lambda value: (
            (type(value) is str and value)
            or value == []
            or (is_texts(value) and len(value) <= MAX_STOPS and all(value))
        ),
        f"a string, or a list of up to {MAX_STOPS}, none of them empty",
    ),
    "stream": (False, *one_of(bool, "true or false")),
    "stream_options": (
        {},
        lambda value: type(value) is dict and all(type(flag) is bool for flag in value.values()),
        "an object of flags",
    ),
    "seed": (None, *number(-(1 << 63), (1 << 63) - 1, whole=True)),
    "echo": (False, *one_of(bool, "true or false")),
    "user": ("", *one_of(str, "a string")),
    "logprobs": (None, *nothing()),
    "suffix": (None, *nothing("")),
    "best_of": (None, *nothing(1)),
    "frequency_penalty": (0, *nothing(0)),
    "presence_penalty": (0, *nothing(0)),
    "logit_bias": ({}, *nothing({})),
}


def parse(body: bytes, model: str, tokenizer, seq_len: int, free_seed: int) -> Completion:
    """Parses and checks a request. Raises: Bad.

    Args:
      body: JSON.
      model: the name of the only model.
      tokenizer: the model's tokenizer.
      seq_len: the context.
      free_seed: the seed of a request that gives none.
    """
    try:
        given = untrusted.json_object(body, "The request", "send one JSON object")
    except Refused as refusal:
        raise Bad(str(refusal)) from refusal
    for name in given:
        if name not in PARAMETERS:
            raise Bad(
                f"Unknown parameter {shown(name)}.{nearest(name, PARAMETERS)}", name if name.isprintable() else None
            )
    values = {}
    for name, (default, fits, what) in PARAMETERS.items():
        values[name] = default if given.get(name) is None else given[name]
        if given.get(name) is not None and not fits(values[name]):
            raise Bad(f"{name} is {shown(values[name])}, and must be {what}.", name)
    if values["model"] is None:
        raise Bad(f"model is missing: ask for {model}.", "model")
    if values["model"] != model:
        raise Bad(f"model={shown(values['model'])} is unknown: ask for {model}.", "model", 404, "model_not_found")
    prompts = values["prompt"]
    if type(prompts) is str or type(prompts[0]) is int:
        prompts = [prompts]
    if len(prompts) * values["n"] > MAX_TEXTS:
        raise Bad(f"{len(prompts)} prompts and n={values['n']} are more than {MAX_TEXTS} texts: ask for fewer.", "n")
    keys = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
    sampling = Sampling(*(values[key] for key in keys))
    seed = (free_seed if values["seed"] is None else values["seed"]) % (1 << 32)
    rows, echoed = [], []
    for prompt in prompts:
        try:
            ids = encode_prompt(tokenizer, prompt).tolist() if type(prompt) is str else prompt
        except Refused as refusal:
            raise Bad(str(refusal), "prompt") from refusal
        if max(ids, default=0) >= tokenizer.vocab_size:
            raise Bad(f"prompt has token {max(ids)}, and the vocabulary {tokenizer.vocab_size}.", "prompt")
        ids = [tokenizer.begin, *ids]
        try:
            check([ids], seq_len, values["max_tokens"], sampling, seed)
        except Refused as refusal:
            raise Bad(str(refusal).replace("--", ""), "max_tokens", code="context_length_exceeded") from refusal
        for _ in range(values["n"]):
            rows.append(Prompt(ids, values["max_tokens"], sampling, seed, len(rows)))
            text = prompt if type(prompt) is str else tokenizer.decode(prompt)
            echoed.append(text if values["echo"] else "")
    stop = (values["stop"],) if type(values["stop"]) is str else tuple(values["stop"])
    usage = values["stream_options"].get("include_usage", False)
    return Completion(model, rows, stop, values["stream"], usage, echoed)


class Answer:
    """Builds the objects that answer a request."""

    def __init__(self, completion: Completion):
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": completion.model,
        }
        self._prompts = completion.prompts

    def choices(self, *choices: tuple[int, str, str]) -> dict:
        """The choices, each given as (index, text, finish reason or "")."""
        keys = "index", "text", "finish_reason"
        shown = [
            dict(zip(keys, (*choice[:2], choice[2] or None), strict=True)) | {"logprobs": None} for choice in choices
        ]
        return self._head | {"choices": shown}

    def usage(self, made: int) -> dict:
        """The token counts for `made` new tokens. A prompt counts once, however often it is continued."""
        asked = sum(len(ids) - 1 for ids in {id(prompt.ids): prompt.ids for prompt in self._prompts}.values())
        return {"usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}}


def event(data: dict | str) -> bytes:
    """Encodes a server-sent event."""
    return b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"
