"""Compares tokenizing with the batch encoders of SentencePiece and Hugging Face's `tokenizers`, in the same threads.

    python -m benchmarks.tokenizing [--rounds=15]

The standard library's source code, in batches as preparation makes them. Theirs is called as its documentation does:
texts in, lists of ids out. Ours also gives arrays, and refuses a text that would not come back. Both take turns on each
batch, so that other load falls on both; medians of the time for all batches, and of their ratios. From several
processes, each has one thread and its own share of the documents, and they begin each turn together.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time

import sentencepiece
import tokenizers as library
from tokenizers import models, pre_tokenizers, trainers

from gptjax.data.preparation import tasks
from gptjax.data.sources.documents import DataConfig
from gptjax.data.sources.sources import documents
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig

VOCAB_SIZE = 8192
# Whose encoder each is measured against.
LIBRARIES = {"bpe": "SentencePiece", "unigram": "SentencePiece", "huggingface": "tokenizers"}


def train(folder: str) -> dict[str, str]:
    """The folders of the tokenizers to measure, by name."""
    texts = [document.text for document in documents(DataConfig())]
    for model in ("bpe", "unigram"):
        tokenizer.train(TokenizerConfig(vocab_size=VOCAB_SIZE, model=model), texts, f"{folder}/{model}")
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.save(f"{folder}/tokenizer.json")
    given = TokenizerConfig(kind="huggingface", path=f"{folder}/tokenizer.json")
    tokenizer.train(given, [], f"{folder}/huggingface")
    return {name: f"{folder}/{name}" for name in LIBRARIES}


def encoders(name: str, folder: str, threads: bool):
    """(ours, theirs): what encodes a list of texts, on all cores or on one."""
    made = tokenizer.load(folder)

    def ours(texts):
        return made.encode_batch(texts, -1 if threads else 1)

    if name == "huggingface":
        # RAYON_NUM_THREADS says on how many.
        own = library.Tokenizer.from_file(f"{folder}/huggingface.json")
        return ours, lambda texts: [encoding.ids for encoding in own.encode_batch_fast(texts, add_special_tokens=False)]
    own = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/sentencepiece.model")
    return ours, lambda texts: own.encode(texts, num_threads=-1 if threads else 1)


def measure(name, folder, rank, processes, rounds, barrier, results):
    """Seconds of (ours, theirs) for all batches of this process, each round."""
    batches = list(tasks.batches(list(documents(DataConfig()))[rank::processes]))
    batches = [[document.text for document in batch] for batch in batches]
    both = encoders(name, folder, processes == 1)
    taken = []
    for round in range(rounds + 1):
        seconds = [0.0, 0.0]
        for texts in batches:
            for which in (0, 1) if round % 2 else (1, 0):
                barrier.wait()
                began = time.perf_counter()
                both[which](texts)
                barrier.wait()  # a turn ends with its slowest process
                seconds[which] += time.perf_counter() - began
        taken.append(seconds)
    if rank == 0:
        size = sum(len(document.text.encode()) for document in documents(DataConfig()))
        results.put((size, taken[1:]))  # the first round warms up


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--rounds", type=int, default=15)
    rounds = args.parse_args().rounds
    spawn = multiprocessing.get_context("spawn")
    cores = os.cpu_count()
    print("| tokenizer | from | ours, MB/s | theirs, MB/s | ours / theirs |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in train(folder).items():
            for processes in (1, cores):
                os.environ["RAYON_NUM_THREADS"] = str(cores // processes)
                barrier, results = spawn.Barrier(processes), spawn.Queue()
                shares = [(name, path, rank, processes, rounds, barrier, results) for rank in range(processes)]
                started = [spawn.Process(target=measure, args=share) for share in shares]
                for process in started:
                    process.start()
                size, taken = results.get()
                for process in started:
                    process.join()
                ours, theirs = (size / 1e6 / statistics.median(times) for times in zip(*taken, strict=False))
                ratio = statistics.median(their / our for our, their in taken)
                where = f"1 process, {cores} threads" if processes == 1 else f"{processes} processes, 1 thread each"
                print(
                    f"| {name}, beside {LIBRARIES[name]} | {where} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
