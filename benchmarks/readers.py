"""The readers of words and of single files, for benchmarks/fuzz.py: what to try of each, and the code that is tried."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable

from etils import epath
from hypothesis import strategies as st
from ml_collections import ConfigDict

from benchmarks import hostile
from gptjax.cli import main
from gptjax.errors import Refused
from gptjax.models import remat
from gptjax.parallel import mesh
from gptjax.planning import topology
from gptjax.runtime import files, rendezvous
from gptjax.training import loop, resume_point, workdir
from gptjax.training.config import files as config_file
from gptjax.training.config import schema
from gptjax.training.monitoring import records

CONFIG = json.loads(schema.to_json(schema.parse({})))


@dataclasses.dataclass(frozen=True)
class Reader:
    """inputs: what to try. place: writes one to where `read` finds it. read: the code that is tried."""

    inputs: st.SearchStrategy
    read: Callable[[object], object]
    place: Callable[[object], None] = lambda given: None


def config_json(folder: pathlib.Path) -> Reader:
    def read(_):
        saved = workdir.read_config(epath.Path(folder))
        with contextlib.suppress(Refused):
            resume_point.check_same_run(schema.parse({}), saved, epath.Path(folder))
        return schema.parse(saved)

    file = folder / "config.json"
    return Reader(hostile.json_files(CONFIG) | hostile.NO_FILES, read, lambda given: hostile.put(file, given))


def config_values(folder: pathlib.Path) -> Reader:
    def read(given):
        values, kind = given
        try:
            values = kind(values)
        except Exception as error:
            raise Refused(f"no ConfigDict: {error}") from error
        return schema.parse(values)

    trees = hostile.changed(CONFIG) | st.dictionaries(hostile.words, hostile.values)
    return Reader(st.tuples(trees, st.sampled_from((dict, ConfigDict))), read)


def config_files(folder: pathlib.Path) -> Reader:
    """Python files by design: what is tried is what they make, not what they run."""
    keys = st.sampled_from(list(files.flatten(schema.default()))) | st.just("modle") | st.just("model")
    fault = st.sampled_from(("config = 3", "exit()", "raise MemoryError", "config.unlock(); config.a = object()", "(",
                             "config.num_steps = 10**6000", "config.model.biases = [[]]", "return {}", "\0", "é\ud800",
                             "raise ValueError('. is of original type ' * 9999)"))  # fmt: skip
    flat = files.flatten(schema.default())
    fields = st.sampled_from(list(flat.items())).map(lambda item: f"config.{item[0]} = {item[1]!r}")
    others = st.builds(lambda key, value: f"config.{key} = {value!r}", keys, hostile.values)
    lines = st.lists(fault | fields | fields | others, max_size=3)
    head = "from gptjax.config import default\nnan = inf = float('nan')\ndef get_config():\n    config = default()\n"

    def text(lines) -> str:
        return head + "".join(f"    {line}\n" for line in (*lines, "return config"))

    file = folder / "mine.py"

    def place(given: str) -> None:
        hostile.put(file, given.encode("utf-8", "surrogatepass"))

    return Reader(lines.map(text), lambda _: config_file.load(str(file), {}), place)


def overrides(folder: pathlib.Path) -> Reader:
    def read(overrides):
        changed = schema.default()
        for key, text in overrides:
            config_file.override(changed, key, text)
        return schema.parse(changed)

    flat = files.flatten(schema.default())
    known = st.sampled_from(list(flat.items())).flatmap(lambda item: st.tuples(st.just(item[0]), of(str(item[1]))))

    def of(text: str):
        return hostile.of_text(text) | hostile.numbers.map(str) | st.sampled_from(("true", "False", "full,x=y"))

    unknown = st.tuples(st.sampled_from(list(flat)).flatmap(hostile.of_text), hostile.words)
    return Reader(st.lists(known | known | unknown, min_size=1, max_size=2), read)


def command_line(folder: pathlib.Path) -> Reader:
    def read(argv):
        args = main.parse(argv)
        if args.verb == "train":
            loop.profiled(args.profile_steps, 1000)
            given = {name: getattr(args, name) for name in rendezvous.FLAGS if getattr(args, name) is not None}
            return given and rendezvous.given(given)
        if args.verb == "plan":
            return topology.parse(args.topology, args.slices)
        return args

    whole = (
        ["train", "--config=c.py", "--workdir=w", "--profile_steps=3:5", "--config.num_steps=3", "--config.seed", "3"],
        ["train", "--config=c.py", "--workdir=w", "--coordinator=10.0.0.2:8476", "--num_processes=2", "--process_id=1"],
        ["eval", "--workdir=w", "--step=-1", "--coordinator_timeout=5"],
        ["generate", "--workdir=w", "--prompt=a", "--temperature=0.5", "--seed=1", "--top_p", "0.5"],
        ["plan", "--config=c.py", "--topology=v5p:8x8x8", "--slices=2", "--json"],
        ["bench", "--config=c.py", "--steps=3"],
    )

    @st.composite
    def lines(draw):
        line = list(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(line) - 1))
            line[at : at + draw(st.integers(0, 1))] = [draw(hostile.of_text(line[at]))]
        return line

    return Reader(lines() | st.lists(hostile.words, max_size=8), read)


def words(folder: pathlib.Path) -> Reader:
    """The small languages of single flags and keys; of a mesh, the sizes of its axes."""
    whole = st.integers(-3, 3) | st.integers() | st.sampled_from((2**31, 10**15, 10**40))
    tries = {
        "topology": lambda text, number: topology.parse(text, number),
        "profile": lambda text, number: loop.profiled(text, max(number, 1)),
        "coordinator": lambda text, number: rendezvous.given(
            {"coordinator": text, "num_processes": number, "process_id": 0}
        ),
        "remat": lambda text, number: remat.parse(text),
        "mesh": lambda text, number: mesh.mesh_shape(
            mesh.MeshConfig(number, *map(len, text.split(",")[:3])), 8, 1
        ),
    }  # fmt: skip
    texts = {
        "topology": ("v5p:8x8x8", "h100:8x4", "v5e:4x4", "tpu7x:4x4x4"),
        "profile": ("100:103", "0:1"),
        "coordinator": ("10.0.0.2:8476", "[::1]:80"),
        "remat": ("full,block_input=offload", "dots,mlp_up=recompute,mlp_gate=recompute", "none"),
        "mesh": ("1,2,4", "2,-1,1"),
    }
    given = st.sampled_from([(kind, text) for kind, several in texts.items() for text in several]).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), hostile.of_text(pair[1]), whole)
    )
    return Reader(given, lambda given: tries[given[0]](*given[1:]))


def metrics_rows(folder: pathlib.Path) -> Reader:
    rows = [{"step": step, "loss": 1.5, "mfu": None} for step in range(1, 4)] + [{"step": 3, "eval_loss": 2.5}]
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    one = hostile.changed_json(rows[0]).map(lambda line: whole + line + b"\n" + whole)
    file = folder / "metrics.jsonl"

    def read(_):
        found = records.rows_until(epath.Path(file), 2)
        return json.dumps(found), {row["step"] for row in found if "eval_loss" in row}

    return Reader(hostile.damaged(whole) | one | hostile.NO_FILES, read, lambda given: hostile.put(file, given))
