"""A workdir: what belongs to one run, and what must hold before a run goes on in it."""

import base64
import dataclasses
import json
import tempfile
from typing import NamedTuple

import jax
from etils import epath
from flax import nnx

from gptjax import config as configs
from gptjax import hosts, sharding, tokenizer
from gptjax.checkpoint import Checkpoints, placed
from gptjax.config import Config
from gptjax.data import prepare as preparation
from gptjax.data import stream
from gptjax.data.store import Store
from gptjax.errors import Refused, nearest
from gptjax.models.transformer import AXIS_KEYS, Transformer
from gptjax.sharding import MeshConfig


def abstract_model(config: Config, vocab_size: int) -> Transformer:
    """Shapes, dtypes and shardings of a model's weights."""
    return jax.eval_shape(lambda: Transformer(config.model, vocab_size, config.seq_len, nnx.Rngs(0)))


def check_divides(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> None:
    """Every weight divides over the mesh. Raises: Refused."""
    # Shapes on one device: on the mesh itself JAX would raise, in words of its own.
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])):
        shapes = abstract_model(config, vocab_size)
    sharding.check_divides(shapes, mesh, AXIS_KEYS)


def check(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> None:
    """What can be refused before anything is written. Raises: Refused."""
    configs.check_batch(config, mesh)
    byte = config.tokenizer.kind == "byte"
    check_divides(config, tokenizer.ByteTokenizer.vocab_size if byte else config.tokenizer.vocab_size, mesh)
    if "://" not in str(folder):
        check_writable(folder)
    if (folder / "config.json").exists():
        check_same_run(config, read_config(folder), folder)
    elif (folder / "checkpoints").exists():
        raise Refused(
            f"{folder} has checkpoints but no config.json, so nothing says what run they are of: put it back, "
            "or give an empty --workdir."
        )


def check_writable(folder: epath.Path) -> None:
    """A local folder can be made, or written into where it exists. Raises: Refused."""
    inside = next(path for path in (folder, *folder.parents) if path.exists())
    if not inside.is_dir():
        raise Refused(f"--workdir={folder} can't be a folder, because {inside} is a file: give another.")
    try:  # the permission bits alone say nothing to root, on a read-only mount or in /proc
        with tempfile.TemporaryDirectory(dir=inside):
            pass
    except OSError as error:
        raise Refused(f"--workdir={folder} can't be written to ({inside}: {error.strerror}): give another.") from error


def read_config(folder: epath.Path) -> dict:
    """The resolved config that the run in a workdir last went on with. Raises: Refused."""
    path = folder / "config.json"
    if not path.exists():
        known = folder.parent.glob("*") if folder.parent.exists() else ()
        raise Refused(
            f"{path} does not exist: {folder} is not the workdir of a run."
            f"{nearest(folder.name, [p.name for p in known if p.name != folder.name])}"
        )
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise Refused(f"{path} is damaged ({error}): put back the file that the run wrote.") from error


def check_same_run(config: Config, saved: dict, where: epath.Path) -> None:
    """Raises: Refused, naming the keys by which `config` and the `saved` one are different runs."""
    differing = configs.differences(saved, config)
    if differing:
        raise Refused(
            f"{where} belongs to a run of another config: {', '.join(differing)}. Use the old values, or "
            "another --workdir."
        )


def store_folder(setting: str, folder: epath.Path) -> epath.Path:
    """Where the token store of a run in `folder` is, by its data.store."""
    return epath.Path(setting) if setting else folder / "store"


def identity(config: Config, store: Store) -> dict:
    """What a checkpoint keeps beside the state: which run it is of, and what to read its tokens with."""
    files = tokenizer.read_files(store.folder / "tokenizer")
    return {
        "config": dataclasses.asdict(config),
        "tokenizer_hash": store.tokenizer.hash,
        "text_hash": store.manifest["text_hash"],
        "tokenizer": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def check_same_data(store: Store, saved: dict, where: epath.Path) -> None:
    """Raises: Refused, when a store does not hold the tokens that a checkpoint was trained on."""
    for name, here in (("tokenizer_hash", store.tokenizer.hash), ("text_hash", store.manifest["text_hash"])):
        if saved[name] != here:
            raise Refused(
                f"{store.folder} has {name} {here[:12]}, but {where} was trained on {saved[name][:12]}: put back the "
                "store of that run, or begin anew in another --workdir."
            )


def prepare(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> Store:
    """The token store of a run and, in its workdir, the tokenizer; made if need be, by process 0 while others wait.

    Raises: Refused, for a corpus that can't be used; nothing that was made for it stays.
    """
    where = store_folder(config.data.store, folder)
    with hosts.together():
        if hosts.first():
            store = make_store(config, folder, where)
            check_divides(config, store.tokenizer.vocab_size, mesh)
            write_tokenizer(store, folder)
    with hosts.together():
        if not hosts.first():
            for path in (where / "manifest.json", folder / "tokenizer"):
                if not path.exists():
                    raise Refused(
                        f"{path}, which process 0 made, is not seen by process {jax.process_index()}: give a --workdir "
                        "(and data.store) that all hosts share, such as one on gs://."
                    )
            store = Store.open(where)
    return store


def make_store(config: Config, folder: epath.Path, where: epath.Path) -> Store:
    """The store in `where` for a run in `folder`. Raises: Refused."""
    new = [path for path in (where, *where.parents, folder, *folder.parents) if not path.exists()]
    try:
        store = preparation.prepare(config.data, config.tokenizer, where)
        stream.train_batches(store, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed, rows=[])
        return store
    except Refused:
        # Only the corpus itself could tell; a folder that was there, or has something else in it by now, stays.
        for path in new:
            if path == where and path.exists():
                path.rmtree()
            elif path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def write_tokenizer(store: Store, folder: epath.Path) -> None:
    """A copy of the store's tokenizer into the workdir."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.read_files(store.folder / "tokenizer").items():
        write_whole(folder / "tokenizer" / name, content)


def write_config(config: Config, folder: epath.Path) -> None:
    """Says what the run in a workdir is; once it is sure that it goes on with this config."""
    write_whole(folder / "config.json", configs.to_json(config).encode())
    (folder / "samples.txt").unlink(missing_ok=True)  # of a run that is not complete any more


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file that is either the old one or the new one, whenever the process is killed."""
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(content)
    beside.replace(path)


class Run(NamedTuple):
    """A trained model, ready for use on this machine's devices."""

    config: Config
    step: int
    mesh: jax.sharding.Mesh
    model: Transformer
    tokenizer: tokenizer.Tokenizer
    store: epath.Path


def load(folder: epath.Path, step: int) -> Run:
    """The model of a checkpoint: of a step, or of the newest for -1. Raises: Refused."""
    with hosts.together():
        latest = read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.choose(step)
        saved = checkpoints.run(step)
        config = configs.parse(saved["config"])
        files = {name: base64.b64decode(text) for name, text in saved["tokenizer"].items()}
        its_tokenizer = tokenizer.from_files(files, f"{checkpoints.folder} (step {step})")
        mesh = mesh_that_fits(config, its_tokenizer.vocab_size)
        part = "ema" if config.optimizer.ema_decay else "model"
        with jax.set_mesh(mesh):
            shapes = abstract_model(config, its_tokenizer.vocab_size)
            model = checkpoints.restore(step, placed({part: shapes}, mesh))[part]
    where = store_folder(latest.get("data", {}).get("store", ""), folder)
    return Run(config, step, mesh, model, its_tokenizer, where)


def mesh_that_fits(config: Config, vocab_size: int) -> jax.sharding.Mesh:
    """The mesh of the run; on other devices than it was trained on, the model cut over all of them, or else whole."""
    for axes in (config.mesh, MeshConfig()):
        try:
            mesh = sharding.make_mesh(axes, jax.devices())
            check_divides(config, vocab_size, mesh)
            return mesh
        except Refused:
            continue
    return sharding.make_mesh(MeshConfig(data=-1, fsdp=1), jax.devices())
