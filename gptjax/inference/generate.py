"""Text from a model: continuations of prompts, whole or as they are drawn."""

import dataclasses
from collections.abc import Iterator

from etils import epath

from gptjax.errors import Refused
from gptjax.inference.decoder import CHUNK, PROMPT_TOKENS, Decoder, Prompt, doubled
from gptjax.inference.detokenizer import Continuation
from gptjax.inference.sampling import Sampling
from gptjax.models.interface import LanguageModel
from gptjax.runtime import untrusted
from gptjax.tokenizers.tokenizer import encode_prompt

STREAM = 4  # steps between two looks while somebody reads along
MAX_PROMPTS_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Request:
    """How prompts are continued.

    Args:
      seq_len: the context of the model.
      max_tokens: the most tokens that a row gets.
      sampling: how the next token is drawn.
      seed: from 0 to 2³² - 1.
      stop: strings that end a row, with the token that completes the string; `Continuation` cuts the text itself.
      opened: whether the prompts bring the token that opens a document, or go without that token.
    """

    seq_len: int
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    opened: bool = False


def check(prompts: list[list[int]], seq_len: int, max_tokens: int, sampling: Sampling, seed: int) -> None:
    """Checks that prompts and their continuations fit into the context. Raises: Refused, also for a bad number."""
    sampling.check()
    if not 0 <= seed < 1 << 32:
        raise Refused(f"--seed={seed} does not fit the 32 bits of a JAX key: use one from 0 to {(1 << 32) - 1}.")
    if max_tokens < 1:
        raise Refused(f"--max_tokens={max_tokens} must be at least 1.")
    longest = max((len(prompt) for prompt in prompts), default=1)
    if not all(prompts):
        raise Refused("A prompt has no tokens, and no token opens the document: give at least one.")
    if longest > seq_len:
        raise Refused(
            f"The prompt has {longest - 1} tokens, and the context of {seq_len} takes at most {seq_len - 1}: "
            "shorten it."
        )
    if longest + max_tokens > seq_len + 1:
        raise Refused(
            f"The prompt has {longest - 1} tokens and --max_tokens={max_tokens} asks for more than the context "
            f"of {seq_len} holds: ask for at most {seq_len + 1 - longest}."
        )


def grow(
    model: LanguageModel, prompts: list[list[int]], tokenizer, request: Request, *, steps: int = CHUNK
) -> Iterator[list[Continuation]]:
    """`generate` that yields the rows every `steps` tokens; the objects stay the same."""
    if not all(request.stop):
        raise Refused('--stop="" is at the beginning of any text: leave it out.')
    prompts = prompts if request.opened else [[tokenizer.begin, *prompt] for prompt in prompts]
    max_tokens, sampling, seed = request.max_tokens, request.sampling, request.seed
    check(prompts, request.seq_len, max_tokens, sampling, seed)
    rows = [Continuation(tokenizer, max_tokens, request.stop) for _ in prompts]
    if not prompts:
        return
    slots = doubled(PROMPT_TOKENS, max(len(prompt) for prompt in prompts) + max_tokens, request.seq_len)
    decoder = Decoder(model.for_decoding(), tokenizer, len(prompts), slots)
    made = decoder.begin({row: Prompt(ids, max_tokens, sampling, seed, row) for row, ids in enumerate(prompts)})
    while True:
        for row, tokens in made.items():
            rows[row].push(tokens)
        yield rows
        going = [number for number, row in enumerate(rows) if not row.finish]
        if not going:
            return
        made = decoder.step(going, steps)


def generate(model: LanguageModel, prompts: list[list[int]], tokenizer, request: Request) -> list[list[int]]:
    """Continues prompts of token ids, each as a document of its own, until the document ends or has `max_tokens` more.

    Row i of the same prompts and seed gets the same tokens however many rows there are.

    Raises: Refused, when a prompt and `max_tokens` exceed the context.
    """
    *_, rows = [], *grow(model, prompts, tokenizer, request)
    return [row.tokens for row in rows]


def samples(model: LanguageModel, tokenizer, prompt: str, *, seq_len: int, count: int, seed: int) -> list[str]:
    """Continues a prompt `count` times, for the end of a run. The model sees the last half context of a long prompt."""
    ids = encode_prompt(tokenizer, prompt).tolist()[-(seq_len // 2) :]
    length = min(seq_len - len(ids), 200)
    sampling = Sampling(temperature=0.7, top_p=0.95)
    made = generate(model, [ids] * count, tokenizer, Request(seq_len, length, sampling, seed))
    return [prompt + tokenizer.decode(more) for more in made]


def read_prompts(path: epath.Path) -> list[str]:
    """Reads the prompts of a file, one a line. Raises: Refused."""
    remedy = "give a file of UTF-8 text with a prompt a line"
    try:
        prompts = untrusted.read(path, MAX_PROMPTS_BYTES, remedy).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Refused(f"{path} must be UTF-8, and byte {error.start} is not: {remedy}.") from error
    if not prompts:
        raise Refused(f"{path} holds no prompt: {remedy}.")
    return prompts
