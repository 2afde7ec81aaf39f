"""Text from a model: continuations of prompts, whole or as they come."""

from collections.abc import Iterator

from etils import epath

from gptjax.errors import Refused
from gptjax.inference.decoder import CHUNK, PROMPT_TOKENS, Decoder, Prompt, doubled
from gptjax.inference.detokenizer import Continuation
from gptjax.inference.sampling import Sampling
from gptjax.models.transformer import Transformer
from gptjax.runtime import untrusted
from gptjax.tokenizers.tokenizer import encode_prompt

STREAM = 4  # steps between two looks where somebody reads
MAX_PROMPTS_BYTES = 16 << 20


def check(prompts: list[list[int]], seq_len: int, max_tokens: int, sampling: Sampling, seed: int) -> None:
    """Raises: Refused, when a prompt and what is asked for exceed the context, or a number can't be."""
    sampling.check()
    if not 0 <= seed < 1 << 32:
        raise Refused(f"--seed={seed} does not fit the 32 bits of a JAX key: use one from 0 to {(1 << 32) - 1}.")
    if max_tokens < 1:
        raise Refused(f"--max_tokens={max_tokens} must be at least 1.")
    longest = max((len(prompt) for prompt in prompts), default=1)
    if not all(prompts):
        raise Refused("A prompt has no tokens, and none is put before it: give at least one.")
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
    model: Transformer,
    prompts: list[list[int]],
    tokenizer,
    *,
    seq_len: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: tuple[str, ...] = (),
    opened: bool = False,
    steps: int = CHUNK,
) -> Iterator[list[Continuation]]:
    """`generate`, that shows after each so many `steps` what there is; always the same objects."""
    if not all(stop):
        raise Refused('--stop="" is at the beginning of any text: leave it out.')
    prompts = prompts if opened else [[tokenizer.begin, *prompt] for prompt in prompts]
    check(prompts, seq_len, max_tokens, sampling, seed)
    rows = [Continuation(tokenizer, max_tokens, stop) for _ in prompts]
    if not prompts:
        return
    slots = doubled(PROMPT_TOKENS, max(len(prompt) for prompt in prompts) + max_tokens, seq_len)
    decoder = Decoder(model.unstacked(), tokenizer, len(prompts), slots)
    made = decoder.begin({row: Prompt(ids, max_tokens, sampling, seed, row) for row, ids in enumerate(prompts)})
    while True:
        for row, tokens in made.items():
            rows[row].push(tokens)
        yield rows
        going = [number for number, row in enumerate(rows) if not row.finish]
        if not going:
            return
        made = decoder.step(going, steps)


def generate(
    model: Transformer,
    prompts: list[list[int]],
    tokenizer,
    *,
    seq_len: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: tuple[str, ...] = (),
    opened: bool = False,
) -> list[list[int]]:
    """Continues prompts of token ids, each as a document of its own, until it ends or has `max_tokens` more.

    Row i of the same prompts and seed gets the same tokens however many rows there are.

    Args:
      stop: strings at whose coming a row ends, with the token that completes one; `Continuation` cuts the text itself.
      opened: whether the prompts bring the token that opens a document, or are to go without.

    Raises: Refused, when a prompt and what is asked for exceed the context.
    """
    rows = []
    for rows in grow(
        model, prompts, tokenizer, seq_len=seq_len, max_tokens=max_tokens, sampling=sampling, seed=seed, stop=stop,
        opened=opened,
    ):  # fmt: skip
        pass
    return [row.tokens for row in rows]


def samples(model: Transformer, tokenizer, prompt: str, *, seq_len: int, count: int, seed: int) -> list[str]:
    """Texts that go on from a prompt, for the end of a run; of one over half the context, the model sees its end."""
    ids = encode_prompt(tokenizer, prompt).tolist()[-(seq_len // 2) :]
    length = min(seq_len - len(ids), 200)
    sampling = Sampling(temperature=0.7, top_p=0.95)
    made = generate(model, [ids] * count, tokenizer, seq_len=seq_len, max_tokens=length, sampling=sampling, seed=seed)
    return [prompt + tokenizer.decode(more) for more in made]


def read_prompts(path: epath.Path) -> list[str]:
    """Those of a file, one a line. Raises: Refused."""
    remedy = "give a file of UTF-8 text with a prompt a line"
    try:
        prompts = untrusted.read(path, MAX_PROMPTS_BYTES, remedy).decode().splitlines()
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is no UTF-8 at byte {error.start}: {remedy}.") from error
    if not prompts:
        raise Refused(f"{path} holds no prompt: {remedy}.")
    return prompts
