"""Changes the rows of a small corpus differently each time: a function of the seed, the batch and the row.

Each document of a row is changed in this order:
- Subword regularization (Kudo 2018): the text is encoded again, by an encoding that is drawn. A document that a row
  cuts inside a character stays as it is.
- Fill in the middle (Bavarian et al. 2022, sections 3 and 4.1): two cuts between tokens make a prefix, a middle and a
  suffix. Their new order is prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM), so the document ends with the
  middle.
- Token dropout: inputs, but not targets, are replaced by tokens drawn from the same row: the unigram noise of Xie et
  al. 2017, section 3.1.
A longer result is cut at the end of the row; a shorter result leaves padding.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import Tokenizer

FIM = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


@dataclass(frozen=True)
class AugmentConfig:
    """Changes to training rows; evaluation rows never change. 0 turns a change off.

    subword_alpha: for BPE the share of merges left out, for unigram the exponent of a segmentation's probability.
    fim_rate: share of a row's documents that are rewritten with their middle last. The tokenizer must have the three
        special tokens of `FIM`.
    fim_spm_rate: share of those documents that have the suffix first.
    token_dropout: share of the inputs that are replaced.
    """

    subword_alpha: float = 0.0
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    token_dropout: float = 0.0

    @property
    def on(self) -> bool:
        return self.subword_alpha > 0 or self.fim_rate > 0 or self.token_dropout > 0


def check(config: AugmentConfig) -> None:
    """Raises: Refused."""
    for key in ("subword_alpha", "fim_rate", "fim_spm_rate", "token_dropout"):
        if not 0 <= getattr(config, key) <= 1:
            raise Refused(f"augment.{key}={getattr(config, key)} must be from 0 to 1.")


def check_special(config: AugmentConfig, names: Collection[str]) -> None:
    """Raises: Refused, if fill in the middle is on and a special token is missing from `names`."""
    missing = [name for name in FIM if name not in names]
    if config.fim_rate and missing:
        raise Refused(
            f"augment.fim_rate={config.fim_rate} needs {len(FIM)} special tokens, and the tokenizer lacks {missing[0]}"
            f": prepare the data with tokenizer.special_tokens={','.join(FIM)}."
        )


def check_tokenizer(config: AugmentConfig, tokenizer: Tokenizer) -> None:
    """Raises: Refused, if the tokenizer lacks a special token or has only one encoding of a text."""
    check_special(config, tokenizer.special)
    if config.subword_alpha:
        tokenizer.encode_sampled("probe", 0, config.subword_alpha)


class Augment:
    """Changes the rows of a run."""

    def __init__(self, config: AugmentConfig, tokenizer: Tokenizer, seed: int):
        """Raises: Refused."""
        check_tokenizer(config, tokenizer)
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._special = np.array(sorted(tokenizer.special.values()))

    def row(self, batch: int, row: int, inputs: np.ndarray, targets: np.ndarray, segments: np.ndarray):
        """Changes a row.

        Args:
          batch: number of the batch.
          row: number of the row in the global batch.
          inputs, targets, segments: of the row, int32 [seq_len].

        Returns:
          inputs, targets: int32 [seq_len].
          opens: bool [seq_len], where documents begin.
          real: number of places that are not padding.
        """
        rng = np.random.default_rng((self._seed, batch, row))
        documents = [
            self.document(np.append(inputs[segments == number], targets[segments == number][-1:]), rng)
            for number in range(1, segments.max() + 1)
        ]
        opens = np.zeros(len(inputs), bool)
        starts = np.cumsum([0, *(len(tokens) - 1 for tokens in documents)])
        opens[starts[starts < len(inputs)]] = True
        opens[0] = True
        real = min(int(starts[-1]), len(inputs))
        new_inputs, new_targets = np.zeros((2, len(inputs)), np.int32)
        new_inputs[:real] = np.concatenate([tokens[:-1] for tokens in documents])[:real] if documents else 0
        new_targets[:real] = np.concatenate([tokens[1:] for tokens in documents])[:real] if documents else 0
        new_inputs[:real] = self.dropped(new_inputs[:real], rng)
        return new_inputs, new_targets, opens, real

    def document(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Changes a document; the last of `tokens` is the token that follows the document."""
        opened = int(tokens[0] == self._tokenizer.begin)
        head, body, last = tokens[:opened], tokens[opened:-1], tokens[-1:]
        if self._config.subword_alpha:
            body = self._encoded_again(body, int(rng.integers(1 << 31)))
        if len(body) and rng.random() < self._config.fim_rate:
            prefix, suffix, middle = (np.array([self._tokenizer.special[name]]) for name in FIM)
            one, two = np.sort(rng.integers(0, len(body) + 1, 2))
            before, between, after = body[:one], body[one:two], body[two:]
            if rng.random() < self._config.fim_spm_rate:
                body = np.concatenate([prefix, suffix, after, middle, before, between])
            else:
                body = np.concatenate([prefix, before, suffix, after, middle, between])
            last = np.array([self._tokenizer.end_of_text])
        return np.concatenate([head, body, last]).astype(np.int32)

    def _encoded_again(self, body: np.ndarray, seed: int) -> np.ndarray:
        text = self._tokenizer.decode(body.tolist())
        if len(text.encode()) != self._tokenizer.token_bytes[body].sum() or "\ufffd" in text:
            return body
        return self._tokenizer.encode_sampled(text, seed, self._config.subword_alpha)

    def dropped(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Replaces some inputs by others of the same row; special tokens are neither replaced nor drawn."""
        (plain,) = np.nonzero(~np.isin(inputs, self._special))
        hit = plain[rng.random(len(plain)) < self._config.token_dropout]
        inputs = inputs.copy()
        if len(hit):
            inputs[hit] = inputs[rng.choice(plain, len(hit))]
        return inputs
