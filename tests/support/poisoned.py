"""`gptjax train`, but the batches of BATCHES=3,4,… have no finite loss: for tests that need the real command.

Also in a test's own process: `poison` changes the stream that a run reads from here on.
"""

import os

import numpy as np

from gptjax.cli import main
from gptjax.data.stream import stream


def poison(batches, harm, patch=setattr):
    """Has the stream's elements `batches` harmed, whoever reads them."""

    def iterate(read, start, stop):
        for index in range(start, stop):
            yield harm(read(index)) if index in batches else read(index)

    patch(stream, "iterate", iterate)


def not_finite(batch):
    return batch._replace(weights=batch.weights * np.float32("nan"))


def shuffled(batch):
    """Targets that nothing predicts: a high loss."""
    return batch._replace(targets=(batch.targets * 37 + 11 * np.arange(batch.targets.shape[1])) % 256)


if __name__ == "__main__":
    poison([int(number) for number in os.environ["BATCHES"].split(",")], not_finite)
    main.main()
