"""`gptjax data show`: the rows that a step read or will read, as text."""

from collections.abc import Iterator

import numpy as np
from etils import epath

from gptjax.checkpoints.manager import Checkpoints
from gptjax.data.batch import Batch
from gptjax.data.store.store import Split
from gptjax.data.stream import mixture
from gptjax.data.stream.packing import report, report_line
from gptjax.data.stream.stream import Source, Stream
from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import Tokenizer
from gptjax.training import resume_point, workdir
from gptjax.training.config.schema import Config
from gptjax.training.corpus import open_corpus
from gptjax.training.monitoring import skipped_batches
from gptjax.training.resume_point import ResumePoint

RULE = "─" * 8


def show(config: Config, folder: epath.Path | None, step: int, row: int) -> str:
    """The rows that update `step` of a run reads, or one of them, as text.

    Args:
      config: the config of the run.
      folder: the workdir of a run, whose newest checkpoint has the skipped batches and the past phases; None for a run
        that skips nothing.
      step: the update, counted from 1 as in metrics.jsonl.
      row: the row of the batch; -1 for all.

    Raises: Refused.
    """
    if not 1 <= step <= config.num_steps:
        raise Refused(f"--step={step} must be from 1 to num_steps={config.num_steps}.")
    if folder is None and not (config.data.store or config.mixture.stores):
        raise Refused("data.store and mixture.stores are empty, and --workdir is not given: set one of the three.")
    data, point = _data(config, folder)
    index = skipped_batches.batch_index(point.recovery.ledger, step - 1)
    phase = data.phase(index)
    if not -1 <= row < phase.batch_size:
        raise Refused(f"--row={row} is none of the rows 0 to {phase.batch_size - 1} of step {step}; -1 is all.")
    rows = range(phase.batch_size) if row == -1 else [row]
    batch, sources = data.batch(index, np.array(rows)), data.sources(index)
    lines = [
        f"step {step} reads batch {index}{f', as of the checkpoint of step {point.step}' if point.step else ''}: "
        f"{phase.batch_size} rows of {phase.seq_len} tokens"
        + (", augmented" if config.augment.on else "")
        + "".join(f", {name} {share / mixture.PERIOD:.2%}" for name, share in phase.shares.items() if name)
    ]
    for name, store in data.corpus.stores.items():
        found = report(data.packed[name], store.split("train"), config.seq_len)
        lines += [f"packing{name and f' of {name}'}: {report_line(config.packing.method, found)}"]
    documents = _documents(data, [sources[number] for number in rows])
    for place, number in enumerate(rows):
        fields = Batch(*(field[place] for field in batch))
        lines += ["", *_row(number, fields, sources[number], documents[place], data)]
    return "\n".join(lines)


def _data(config: Config, folder: epath.Path | None) -> tuple[Stream, ResumePoint]:
    """The data of a run, and the resume point in its newest checkpoint. Raises: Refused."""
    config = config if folder is None else workdir.as_begun(config, folder)
    corpus = open_corpus(config, folder)
    saved = folder is not None and (folder / "checkpoints").exists()
    checkpoints = Checkpoints(folder / "checkpoints") if saved else None
    point = resume_point.read(config, corpus, checkpoints, checkpoints.newest() if saved else 0)
    return resume_point.stream(config, corpus, point), point


def _row(number: int, row: Batch, source: Source, documents: list[str], data: Stream) -> list[str]:
    store = data.corpus.stores[source.store]
    padding = int((row.segments == 0).sum())
    lines = [
        f"row {number} · {source.store or 'store'} {store.folder} · {padding} of {len(row.inputs)} padding · weights "
        f"add up to {row.weights.sum():g}"
    ]
    for segment in range(1, row.segments.max() + 1):
        (places,) = np.nonzero(row.segments == segment)
        lines += [f"{RULE} {documents[segment - 1]}, at {places[0]} to {places[-1] + 1} of the row {RULE}"]
        # A token is in the prompt if the weight of the token before it is 0; the first token has its own weight.
        prompt = row.weights[np.append(places[0], places[:-1])] == 0
        lines += [_text(row.inputs[places], prompt, store.tokenizer)]
    return lines


def _documents(data: Stream, sources: list[Source]) -> list[list[str]]:
    """For each source, a line on each of its documents; the names of a store are looked up together."""
    splits = {name: store.split("train") for name, store in data.corpus.stores.items()}
    found = [[part for _, *span in source.spans for part in _parts(splits[source.store], *span)] for source in sources]
    names = {}
    for store, split in splits.items():
        numbers = {
            number for source, parts in zip(sources, found, strict=True) for number, _ in parts if source.store == store
        }
        names |= {(store, number): row for number, row in zip(sorted(numbers), split.names(numbers), strict=True)}
    return [
        [f"{(row := names[source.store, number])['name']} from {row['offset']}, {span}" for number, span in parts]
        for source, parts in zip(sources, found, strict=True)
    ]


def _parts(split: Split, start: int, length: int) -> Iterator[tuple[int, str]]:
    """The number of each document in a span of tokens, and the range of its tokens in the span."""
    at = start
    while at < start + length:
        number = split.document_at(at)
        first, *following = split.document_starts(number, min(number + 2, split.documents)).tolist()
        end = following[0] if following else split.tokens
        stop = min(end, start + length)
        yield number, f"tokens {at - first:,} to {stop - first:,} of its {end - first:,}"
        at = stop


def _text(tokens: np.ndarray, prompt: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a document: special tokens by name, its opening token as ⏵, tokens without loss in ⟦…⟧."""
    prompt = prompt & (tokens != tokenizer.begin)
    borders = np.flatnonzero(prompt[1:] != prompt[:-1]) + 1
    parts = zip(np.split(tokens, borders), np.split(prompt, borders), strict=True)
    return "".join(f"⟦{_plain(part, tokenizer)}⟧" if of[0] else _plain(part, tokenizer) for part, of in parts)


def _plain(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    names = {number: name for name, number in tokenizer.special.items()} | {tokenizer.begin: "⏵"}
    special = np.isin(tokens, list(names))
    parts = np.split(tokens, np.flatnonzero(special[1:] | special[:-1]) + 1)
    return "".join(names.get(int(part[0]), "") or tokenizer.decode(part.tolist()) for part in parts)
