"""`gptjax train` that also writes what lies on its devices: WORKDIR.rows/N.jsonl of process N, a line a step."""

import json
import pathlib
import sys

import jax
from runs import recorded

from gptjax.cli import main as cli
from gptjax.training import loop as train


def record(step: int, rows: dict[int, str]) -> None:
    folder = pathlib.Path(f"{cli.parse(sys.argv[1:]).workdir}.rows")
    folder.mkdir(exist_ok=True)
    with (folder / f"{jax.process_index()}.jsonl").open("a") as file:
        file.write(json.dumps([step, rows]) + "\n")


train.train_batches = recorded(train.train_batches, record)
cli.main()
