"""Layer patterns: which blocks a model has, as written in `model.layers`.

`1(attention/mlp) 2(attention/mlp attention/mlp)` has two segments: one block, then twice a period of two blocks.
A block is a mixer and a feed-forward. Each segment is one `lax.scan` over its repeats, so the weights of a segment are
stacked.
"""

import re
from typing import NamedTuple

from gptjax.errors import Refused, nearest

MIXERS = ("attention",)
FEED_FORWARDS = ("mlp", "moe")
SEGMENT = re.compile(r"([1-9][0-9]{0,5})\(([^()]*)\)")


class Segment(NamedTuple):
    """A period of blocks and how often it is repeated."""

    repeats: int
    period: tuple[tuple[str, str], ...]  # (mixer, feed-forward) of each block

    @property
    def num_layers(self) -> int:
        return self.repeats * len(self.period)


def parse(text: str, num_layers: int) -> tuple[Segment, ...]:
    """The segments of a pattern; an empty pattern is `num_layers` blocks of attention and mlp. Raises: Refused."""
    if not text:
        return (Segment(num_layers, (("attention", "mlp"),)),)
    if not re.fullmatch(rf"{SEGMENT.pattern}(\s+{SEGMENT.pattern})*", text.strip()):
        raise Refused(
            f'model.layers="{text}" must be segments such as "{num_layers}(attention/mlp)", separated by spaces: each '
            "a count and a period of MIXER/FEED_FORWARD blocks."
        )
    segments = []
    for repeats, blocks in SEGMENT.findall(text):
        period = tuple(_block(block, text) for block in blocks.split())
        if not period:
            raise Refused(f'model.layers="{text}" has an empty period; write "{repeats}(attention/mlp)".')
        segments.append(Segment(int(repeats), period))
    found = sum(segment.num_layers for segment in segments)
    if found != num_layers:
        raise Refused(f'model.layers="{text}" has {found} blocks and model.num_layers={num_layers}; make them equal.')
    return tuple(segments)


def _block(block: str, text: str) -> tuple[str, str]:
    mixer, _, feed_forward = block.partition("/")
    for word, words, kind in ((mixer, MIXERS, "mixer"), (feed_forward, FEED_FORWARDS, "feed-forward")):
        if word not in words:
            raise Refused(
                f'model.layers="{text}" has a block "{block}" with the unknown {kind} "{word}"; known: '
                f"{', '.join(words)}.{nearest(word, words)}"
            )
    return mixer, feed_forward
