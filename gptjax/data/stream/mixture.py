"""Mixes several token stores into one corpus, each with its share.

A mixture's weights are rounded to windows out of 10,000 (largest remainder). The windows of the stores are laid out
once in that period, each store's evenly spread. In any 10,000 consecutive windows each store has exactly its share. A
table gives the store of a window, and how many windows that store gave before.
"""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np
from etils import epath

from gptjax.data.store.store import Store
from gptjax.errors import Refused, nearest
from gptjax.runtime.files import user_path
from gptjax.tokenizers.tokenizer import Tokenizer

PERIOD = 10_000  # windows
NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class MixtureConfig:
    """Token stores to train on together, in place of the store of the section `data`.

    stores: names and folders, local or gs://, for example "code=/data/code, web=gs://bucket/web"; empty: no mixture.
    weights: the weight of each store, in any unit, for example "code 0.7, web 0.3". Weights may change from a batch
        on: "0: code 0.7, web 0.3; 5000: web 1".
    """

    stores: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Corpus:
    """The token stores of a run by name, made by one tokenizer; without a mixture, one store with the name ""."""

    stores: dict[str, Store]

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self.stores.values())).tokenizer

    @classmethod
    def open(cls, stores: str) -> "Corpus":
        """Opens the stores of `mixture.stores`. Raises: Refused, also if their tokenizers differ."""
        opened = {name: Store.open(folder) for name, folder in folders(stores).items()}
        (first, one), *others = opened.items()
        for name, store in others:
            if store.tokenizer.hash != one.tokenizer.hash:
                raise Refused(
                    f"mixture.stores: {first} was made by tokenizer {one.tokenizer.hash[:12]} and {name} by "
                    f"{store.tokenizer.hash[:12]}: prepare one of them again, with the other's tokenizer."
                )
        return cls(opened)

    def check_windows(self, seq_len: int) -> None:
        """Raises: Refused, for a store with less than one training window."""
        for store in self.stores.values():
            tokens = store.split("train").tokens
            if tokens < seq_len + 1:
                raise Refused(
                    f"{store.folder} has {tokens} tokens to train on, and a window of seq_len={seq_len} takes "
                    f"{seq_len + 1}: use a smaller seq_len or more text."
                )


def folders(stores: str) -> dict[str, epath.Path]:
    """The folders of `mixture.stores` by name. Raises: Refused."""
    found = {}
    for part in stores.split(","):
        name, equals, folder = (word.strip() for word in part.partition("="))
        if not (NAME.fullmatch(name) and equals and folder):
            raise Refused(
                f'mixture.stores has "{part.strip()}", which must be NAME=FOLDER: write for example '
                '"code=/data/code, web=/data/web".'
            )
        if name in found:
            raise Refused(
                f"mixture.stores names {name} twice, {found[name]} and {folder}: give each store its own name."
            )
        found[name] = epath.Path(user_path(folder))
    return found


def shares(weights: str, names: list[str]) -> dict[str, int]:
    """Windows of each store in a period, for weights such as "code 0.7, web 0.3". Raises: Refused."""
    found = {}
    for part in weights.split(","):
        name, _, number = part.strip().partition(" ")
        try:
            weight = float(number)
        except ValueError:
            raise Refused(
                f'mixture.weights has "{part.strip()}", which must be NAME NUMBER, for example "code 0.7, web 0.3".'
            ) from None
        if name not in names:
            raise Refused(
                f"mixture.weights has {name}, which must be one of the stores {', '.join(names)}.{nearest(name, names)}"
            )
        if name in found:
            raise Refused(f"mixture.weights has {name} twice, {found[name]:g} and {weight:g}: give one weight.")
        if not 0 < weight < math.inf:
            raise Refused(f"mixture.weights has {name} {number.strip()}; a weight must be above 0; leave {name} out.")
        found[name] = weight
    total = sum(found.values())
    exact = {name: PERIOD * (weight / total) for name, weight in found.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: PERIOD - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise Refused(
                f"mixture.weights has {name} {found[name]:g} of {total:g}, less than one window in {PERIOD}: raise it, "
                f"or leave {name} out."
            )
    return counts


def taken(shares: dict[str, int], windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For windows counted from where the shares began to hold: the store of each, by its place in `shares`, and the
    number of that store's windows before it."""
    store_of, before = _period(tuple(shares.values()))
    period, inside = np.divmod(windows, PERIOD)
    stores = store_of[inside]
    return stores, period * np.array([*shares.values()])[stores] + before[inside]


def given(shares: dict[str, int], windows: int) -> dict[str, int]:
    """How many of the first `windows` windows each store has."""
    store_of, _ = _period(tuple(shares.values()))
    period, inside = divmod(windows, PERIOD)
    rest = np.bincount(store_of[:inside], minlength=len(shares)).tolist()
    return {name: period * share + more for (name, share), more in zip(shares.items(), rest, strict=True)}


@functools.cache
def _period(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The store of each window of a period, and how many windows of the same store precede it in the period."""
    number = np.concatenate([np.arange(share) for share in shares])
    store = np.repeat(np.arange(len(shares)), shares)
    order = np.argsort((number + 0.5) / np.repeat(shares, shares), kind="stable")
    return store[order], number[order]
