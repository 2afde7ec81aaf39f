"""`gptjax train` that also writes what lies on its devices: WORKDIR.rows/N.jsonl of process N, a line a step."""

import json
import pathlib
import sys

import jax
from runs import recorded

from gptjax.cli import main
from gptjax.training import loop


def record(step: int, rows: dict[int, str]) -> None:
    folder = pathlib.Path(f"{main.parse(sys.argv[1:]).workdir}.rows")
    folder.mkdir(exist_ok=True)
    with (folder / f"{jax.process_index()}.jsonl").open("a") as file:
        file.write(json.dumps([step, rows]) + "\n")


loop.train_batches = recorded(loop.train_batches, record)
main.main()
