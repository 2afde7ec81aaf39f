"""`gptjax data prepare`: tokenizing beside SentencePiece's own batch encoder, and memory over the size of a corpus.

    python -m benchmarks.preparing [--rounds=3] [--workers=2] [--megabytes=64] [--memory=128,512,2048]

The corpus is made here: JSON Lines of the standard library's files, each with a number in front, so that no two are
alike. Speed: the step that tokenizes, from the lines on disk to the pieces on disk, beside as many processes that call
SentencePiece's `encode` on lists of the same texts, which they hold in memory. Both are timed from when the processes
work; they take turns, and the ratio is the median of the rounds'. Memory: the resident sets of all processes of
`gptjax data prepare`, added up every 0.2 s, for corpora of several sizes; tokens are bytes there, to be done in time.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import sentencepiece
from etils import epath

from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation import executor, prepare, tasks
from gptjax.data.sources import sources
from gptjax.data.sources.documents import DataConfig
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "debug.py"


def corpus(folder: pathlib.Path, megabytes: int) -> DataConfig:
    """Writes the corpus as files of 32 MB each."""
    texts, number, made = [document.text for document in sources.documents(DataConfig())], 0, 0
    folder.mkdir()
    for file in range(-(-megabytes // 32)):
        with (folder / f"{file:04}.jsonl").open("w") as lines:
            size = 0
            while size < 32_000_000 and made < megabytes * 1_000_000:
                line = json.dumps({"text": f"# {number}\n{texts[number % len(texts)]}"}) + "\n"
                size, made, number = size + len(line), made + len(line), number + 1
                lines.write(line)
    return DataConfig("jsonl", f"{folder}/*.jsonl")


def bare(model: str, texts: list[list[str]], begin, seconds) -> None:
    """Runs in a process: tokenizes lists of texts, and puts the seconds into the queue."""
    encoder = sentencepiece.SentencePieceProcessor(model_file=model)
    begin.wait()
    began = time.perf_counter()
    for batch in texts:
        encoder.encode(batch, num_threads=1)
    seconds.put(time.perf_counter() - began)


def theirs(model: str, shares: list[list[list[str]]]) -> float:
    """Returns the seconds from when all processes are ready until all are done."""
    begin, seconds = multiprocessing.Barrier(len(shares)), multiprocessing.Queue()
    running = [multiprocessing.Process(target=bare, args=(model, share, begin, seconds)) for share in shares]
    for process in running:
        process.start()
    took = max(seconds.get() for _ in running)
    for process in running:
        process.join()
    return took


def remember_size(reports: list[tuple[float, int]], documents: int, size: int, tokens: int) -> None:
    """Appends (time, bytes) to `reports` where a worker reports bytes."""
    if size:
        reports.append((time.perf_counter(), size))


def speed(folder: pathlib.Path, megabytes: int, workers: int, rounds: int) -> None:
    data = corpus(folder / "speed", megabytes)
    work = epath.Path(folder / "work")
    work.mkdir()
    step_corpus, survey, _, _ = prepare.surveyed(data, CleanConfig(), work, {}, 1)
    tokenizer.train(TokenizerConfig(), (text.text for text in sources.documents(DataConfig())), work / "tokenizer")
    texts = [document.text for document in sources.documents(data)]
    batches = list(tasks.batches(texts))
    ratios = []
    for turn in range(rounds):
        step = tasks.Tokenize(step_corpus, work / f"pieces{turn}", work / "tokenizer", survey.cut, threads=workers == 1)
        step.folder.mkdir()
        began, reports = time.perf_counter(), []
        executor.run(
            step, len(survey.tasks), workers, work / f"engine{turn}", functools.partial(remember_size, reports)
        )
        ended, (first, before) = time.perf_counter(), reports[0]
        ours = (survey.bytes - before) / 1e6 / (ended - first)
        other = theirs(f"{work}/tokenizer/sentencepiece.model", [batches[i::workers] for i in range(workers)])
        other = survey.bytes / 1e6 / other
        ratios.append(ours / other)
        print(f"round {turn}: ours {ours:.2f} MB/s, after {first - began:.1f} s to the first word of the workers; "
              f"SentencePiece {other:.2f} MB/s; {ratios[-1]:.3f}", flush=True)  # fmt: skip
    print(f"{workers} processes, {survey.bytes / 1e6:.0f} MB: {statistics.median(ratios):.3f} of SentencePiece's speed")


def resident(pid: int) -> int:
    """Returns the unshared bytes of a process and its descendants."""
    total = 0
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if str(pid) == process.name or pid in _parents(int(process.name)):
                pages = (process / "statm").read_text().split()
                total += (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it ended meanwhile
            continue
    return total


def _parents(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def memory(folder: pathlib.Path, sizes: list[int], workers: int) -> None:
    for megabytes in sizes:
        data = corpus(folder / f"memory{megabytes}", megabytes)
        argv = [sys.executable, "-m", "gptjax", "data", "prepare", f"--config={CONFIG}", f"--workers={workers}"]
        argv += [f"--config.data.{key}={value}" for key, value in vars(data).items() if key != "store"]
        argv += [f"--config.data.store={folder}/store{megabytes}", "--config.tokenizer.kind=byte"]
        began, samples = time.monotonic(), []
        running = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        while running.poll() is None:
            samples.append(resident(running.pid))
            time.sleep(0.2)
        if running.returncode:
            sys.exit(f"prepare ended with {running.returncode}")
        quarters = [max(samples[len(samples) * i // 4 : len(samples) * (i + 1) // 4]) >> 20 for i in range(4)]
        seconds = time.monotonic() - began
        print(
            f"{megabytes} MB in {seconds:.0f} s: at most {max(samples) >> 20} MiB, by quarters {quarters}", flush=True
        )
        for path in (f"memory{megabytes}", f"store{megabytes}"):
            epath.Path(folder / path).rmtree()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--memory", default="128,512,2048")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.rounds:
            speed(pathlib.Path(place), options.megabytes, options.workers, options.rounds)
        if options.memory:
            memory(pathlib.Path(place), [int(size) for size in options.memory.split(",")], options.workers)
