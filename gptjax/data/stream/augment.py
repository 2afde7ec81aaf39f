"""Rows of a small corpus told in other ways each time that they come: functions of the seed, the batch and the row.

What is done, in this order, to each document of a row:
- subword regularization (Kudo 2018): its text encoded again, by an encoding that is drawn. A document that a row has cut
  in the midst of a character stays as it is.
- fill in the middle (Bavarian et al. 2022, sections 3 and 4.1): two cuts between its tokens make it prefix, middle and
  suffix, told as prefix, suffix, middle (PSM) or as suffix, prefix, middle (SPM); its end is that of the middle.
- token dropout: inputs, but no targets, replaced by tokens drawn from the same row: the unigram noise of Xie et al. 2017,
  section 3.1.
What a longer telling pushes over the end of a row is left out, and what a shorter one leaves is padding.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import Tokenizer

FIM = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


@dataclass(frozen=True)
class AugmentConfig:
    """What training rows are changed by; evaluation never is. 0 is off.

    subword_alpha: of BPE the share of merges that are left out, of unigram the exponent of a segmentation's probability.
    fim_rate: share of the documents of a row that are told with their middle last. The tokenizer has to have the three
        special tokens of `FIM`.
    fim_spm_rate: of those, the share with the suffix first.
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
    """Raises: Refused, where more special tokens are needed than a tokenizer has by these names."""
    missing = [name for name in FIM if name not in names]
    if config.fim_rate and missing:
        raise Refused(
            f"augment.fim_rate={config.fim_rate} needs {len(FIM)} special tokens, and the tokenizer lacks {missing[0]}: "
            f"prepare the data with tokenizer.special_tokens={','.join(FIM)}."
        )


def check_tokenizer(config: AugmentConfig, tokenizer: Tokenizer) -> None:
    """Raises: Refused, for a tokenizer that can't do what is asked."""
    check_special(config, tokenizer.special)
    if config.subword_alpha:
        tokenizer.encode_sampled("probe", 0, config.subword_alpha)


class Augment:
    """What is done to the rows of a run."""

    def __init__(self, config: AugmentConfig, tokenizer: Tokenizer, seed: int):
        """Raises: Refused."""
        check_tokenizer(config, tokenizer)
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._special = np.array(sorted(tokenizer.special.values()))

    def row(self, batch: int, row: int, inputs: np.ndarray, targets: np.ndarray, segments: np.ndarray):
        """A row told in another way.

        Args:
          row: its number in the global batch. inputs, targets, segments: its own, int32 [seq_len].

        Returns:
          (inputs, targets, opens, real): where documents begin, and how many places are no padding.
        """
        rng = np.random.default_rng((self._seed, batch, row))
        told = [
            self.told(np.append(inputs[segments == number], targets[segments == number][-1:]), rng)
            for number in range(1, segments.max() + 1)
        ]
        opens = np.zeros(len(inputs), bool)
        starts = np.cumsum([0, *(len(tokens) - 1 for tokens in told)])
        opens[starts[starts < len(inputs)]] = True
        opens[0] = True
        real = min(int(starts[-1]), len(inputs))
        new_inputs, new_targets = np.zeros((2, len(inputs)), np.int32)
        new_inputs[:real] = np.concatenate([tokens[:-1] for tokens in told])[:real] if told else 0
        new_targets[:real] = np.concatenate([tokens[1:] for tokens in told])[:real] if told else 0
        new_inputs[:real] = self.dropped(new_inputs[:real], rng)
        return new_inputs, new_targets, opens, real

    def told(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A document, with what follows it as its last token, in another way."""
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
        """Inputs, some of which are replaced by others of them; special ones neither are nor come."""
        (plain,) = np.nonzero(~np.isin(inputs, self._special))
        hit = plain[rng.random(len(plain)) < self._config.token_dropout]
        inputs = inputs.copy()
        if len(hit):
            inputs[hit] = inputs[rng.choice(plain, len(hit))]
        return inputs
