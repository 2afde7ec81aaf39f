"""A workdir: what belongs to one run, and what must hold before a run goes on in it."""

import base64
import dataclasses
import sys
import tempfile
from typing import NamedTuple

import jax
from etils import epath
from flax import nnx

from gptjax.checkpoints import manifest
from gptjax.checkpoints import retention as rotation
from gptjax.checkpoints.manager import Checkpoints, placed
from gptjax.data.preparation import prepare as preparation
from gptjax.data.store.store import Store
from gptjax.data.stream import augment, mixture
from gptjax.data.stream.mixture import Corpus
from gptjax.errors import Refused, nearest, shown
from gptjax.models.config import AXIS_KEYS
from gptjax.models.lora import Adapters, merged
from gptjax.models.transformer import Transformer
from gptjax.parallel import sharding
from gptjax.parallel.sharding import MeshConfig
from gptjax.parallel.xla import options as compiler
from gptjax.runtime import distributed as hosts
from gptjax.runtime import heartbeat, untrusted
from gptjax.tokenizers import tokenizer
from gptjax.training.config import schema as configs
from gptjax.training.config.schema import Config
from gptjax.training.monitoring import early_stopping as stopping
from gptjax.training.monitoring import writers

MAX_CONFIG_BYTES = 1 << 20
CONVERTED = 0  # the step of a checkpoint that no run has saved


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
    check_divides(config, tokenizer.expected_vocab_size(config.tokenizer), mesh)
    compiler.check(config.compiler_options, mesh.devices.flat[0].platform)
    if "://" not in str(folder):
        check_writable(folder)
    if rotation.at(folder / "checkpoints", CONVERTED).exists():
        raise Refused(
            f"{folder} holds a converted model, weights alone, and no run to go on with: begin one in another --workdir "
            f"with --config.init_from={folder}."
        )
    if (folder / "config.json").exists():
        check_same_run(config, read_config(folder), folder)
    elif (folder / "checkpoints").exists():
        raise Refused(
            f"{folder} has checkpoints but no config.json, so nothing says what run they are of: put it back, "
            "or give an empty --workdir."
        )


def check_empty(folder: epath.Path) -> None:
    """Raises: Refused, where a run has begun in a folder, or anything else is in it."""
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if inside:
        raise Refused(
            f"--fresh begins a run in an empty --workdir, and {folder} holds {', '.join(inside[:3])}"
            f"{', …' * (len(inside) > 3)}: give another --workdir, or go on without --fresh."
        )


def check_never_saved(folder: epath.Path) -> None:
    """A run without a checkpoint has begun just now, and not lost those that it had. Raises: Refused."""
    saved = [row["step"] for row in _rows(folder, sys.maxsize) if "save_seconds" in row]
    if saved:
        raise Refused(
            f"{folder / 'checkpoints'} holds no checkpoint, but metrics.jsonl says that this run saved step "
            f"{max(saved)}: put the checkpoints back, or begin anew in an empty --workdir."
        )


def check_writable(folder: epath.Path, flag: str = "--workdir") -> None:
    """A local folder can be made, or written into where it exists. Raises: Refused."""
    inside = next(path for path in (folder, *folder.parents) if path.exists())
    if not inside.is_dir():
        raise Refused(f"{flag}={folder} can't be a folder, because {inside} is a file: give another.")
    try:  # the permission bits alone say nothing to root, on a read-only mount or in /proc
        with tempfile.TemporaryDirectory(dir=inside):
            pass
    except OSError as error:
        raise Refused(f"{flag}={folder} can't be written to ({inside}: {error.strerror}): give another.") from error


def read_config(folder: epath.Path) -> dict:
    """The resolved config that the run in a workdir last went on with. Raises: Refused."""
    path = folder / "config.json"
    if not path.exists():
        known = folder.parent.glob("*") if folder.parent.exists() else ()
        raise Refused(
            f"{path} does not exist: {folder} is not the workdir of a run."
            f"{nearest(folder.name, [p.name for p in known if p.name != folder.name])}"
        )
    remedy = "put back the file that the run wrote"
    config = untrusted.read_json(path, configs.MAX_JSON_BYTES, remedy)
    for key, value in configs.flatten(config).items():
        if type(value) not in (bool, int, float, str):
            raise Refused(f"{path} is damaged ({shown(key)} is {shown(value)}): {remedy}.")
    return config


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


def open_corpus(config: Config, folder: epath.Path) -> Corpus:
    """What a run in `folder` reads, where it is prepared. Raises: Refused."""
    if config.mixture.stores:
        return Corpus.open(config.mixture.stores)
    return Corpus({"": Store.open(store_folder(config.data.store, folder))})


def identity(config: Config, corpus: Corpus) -> dict:
    """What a checkpoint keeps beside the state: which run it is of, and what to read its tokens with."""
    files = tokenizer.read_files(next(iter(corpus.stores.values())).folder / "tokenizer")
    return {
        "config": dataclasses.asdict(config),
        "tokenizer_hash": corpus.tokenizer.hash,
        "text_hashes": {name: store.manifest["text_hash"] for name, store in corpus.stores.items()},
        "tokenizer": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def check_same_data(corpus: Corpus, saved: dict, where: epath.Path) -> None:
    """Raises: Refused, when stores do not hold the tokens that a checkpoint was trained on; there may be more of them."""
    untrusted.check_types(saved, {"text_hashes": dict}, where, "begin anew in another --workdir")
    known = saved["text_hashes"]
    for name, store in corpus.stores.items():
        text = store.manifest["text_hash"]
        pairs = [("tokenizer_hash", store.tokenizer.hash, saved.get("tokenizer_hash"))]
        for what, here, there in pairs + [("text_hash", text, known.get(name, text))]:
            if here != there:
                raise Refused(
                    f"{store.folder} has {what} {here[:12]}, but {where} was trained on {str(there)[:12]}: put back the "
                    "store of that run, or begin anew in another --workdir."
                )
        others = [other for other in known if known[other] == text and name not in known]
        if others == [""]:  # the order of a store's rows is one by its name, which this one did not have
            raise Refused(
                f"mixture.stores calls {store.folder} {name}, and {where} is of a run that began with it alone, and "
                f"without a name: go on with data.store={store.folder} and no mixture, or begin anew in another "
                f"--workdir, with mixture.weights={name} 1 at first."
            )
        if others and not name:
            raise Refused(
                f"{store.folder} is {shown(others[0])} of the mixture that {where} is of: go on with "
                f"mixture.stores='{others[0]}={store.folder}' and mixture.weights='{others[0]} 1'."
            )
        if others:
            raise Refused(
                f"mixture.stores calls {store.folder} {name}, and {where} knows its text as {shown(others[0])}: keep the "
                "name, by which a run finds how far it was in a store, or begin anew in another --workdir."
            )


def saved_tokenizer(saved: dict, where: str) -> tokenizer.Tokenizer:
    """The tokenizer that a checkpoint brings. Raises: Refused."""
    try:
        files = {name: base64.b64decode(text, validate=True) for name, text in saved["tokenizer"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{where} brings no tokenizer ({error}): put back the checkpoint that the run wrote.") from error
    if tokenizer.hash_of(files) != saved.get("tokenizer_hash"):
        raise Refused(
            f"{where} brings tokenizer {tokenizer.hash_of(files)[:12]}, and was trained with "
            f"{str(saved.get('tokenizer_hash'))[:12]}: put back the checkpoint that the run wrote."
        )
    return tokenizer.from_files(files, where)


def prepare(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh) -> Corpus:
    """The token stores of a run and, in its workdir, the tokenizer; made if need be, by process 0 while others wait.

    Raises: Refused, for a corpus that can't be used; nothing that was made for it stays.
    """
    with hosts.together():
        if hosts.first():
            corpus = make_corpus(config, folder)
            check_divides(config, corpus.tokenizer.vocab_size, mesh)
            augment.check_tokenizer(config.augment, corpus.tokenizer)
            write_tokenizer(corpus, folder)
    with hosts.together():
        if not hosts.first():
            where = [store_folder(config.data.store, folder)]
            where = list(mixture.folders(config.mixture.stores).values()) if config.mixture.stores else where
            for path in (*(each / "manifest.json" for each in where), folder / "tokenizer"):
                if not path.exists():
                    raise Refused(
                        f"{path}, which process 0 made, is not seen by process {jax.process_index()}: give a --workdir "
                        "(and data.store) that all hosts share, such as one on gs://."
                    )
            corpus = open_corpus(config, folder)
    return corpus


def make_corpus(config: Config, folder: epath.Path) -> Corpus:
    """The stores of a run in `folder`: those of its mixture, or the one that is made of its source. Raises: Refused."""
    where, beats = store_folder(config.data.store, folder), folder / heartbeat.FOLDER
    # A bucket keeps no empty folders, and the last of its parents is the list of all buckets.
    around = [path for each in (where, folder) if "://" not in str(each) for path in (each, *each.parents)]
    new = [path for path in (where, beats, *around) if not path.exists()]
    made = False
    try:
        if config.mixture.stores:
            corpus = open_corpus(config, folder)
            check_vocabulary(config, corpus)
        else:
            store, made = preparation.prepared(config.data, config.tokenizer, where, 1, config.clean)
            corpus = Corpus({"": store})
        corpus.check_windows(config.seq_len)
        return corpus
    except Refused:
        # Only the corpus itself could tell; a folder that was there, or has something else in it by now, stays, and so
        # does a store that another run made meanwhile.
        for path in new:
            if (path == beats or path == where and made) and path.exists():
                path.rmtree()
            elif path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def check_vocabulary(config: Config, corpus: Corpus) -> None:
    """The vocabulary by the config, which check, plan and bench count, is that of the stores. Raises: Refused."""
    expected, found = tokenizer.expected_vocab_size(config.tokenizer), corpus.tokenizer.vocab_size
    if expected != found:
        path = next(iter(corpus.stores.values())).folder / "tokenizer"
        if isinstance(corpus.tokenizer, tokenizer.ByteTokenizer):
            remedy = f"tokenizer.kind=byte, with the special_tokens of {path / 'tokenizer.json'}"
        else:
            remedy = f"tokenizer.path={path}, or tokenizer.vocab_size={found}"
        raise Refused(
            f"mixture.stores has a vocabulary of {found}, and the section tokenizer {expected}: set {remedy}."
        )


def write_tokenizer(corpus: Corpus, folder: epath.Path) -> None:
    """A copy of the stores' tokenizer into the workdir."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.read_files(next(iter(corpus.stores.values())).folder / "tokenizer").items():
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
    latest: Config  # with which the run last went on, and which says where its stores are


def losses(folder: epath.Path, until: int = sys.maxsize) -> dict[int, float]:
    """On the held-out text, by step up to `until`, as metrics.jsonl has them; the same on all processes."""
    found = {}
    with hosts.together():
        if hosts.first():
            found = stopping.evaluations(_rows(folder, until))
    return dict(hosts.shared(lambda: [*found.items()]))


def _rows(folder: epath.Path, until: int) -> list[dict]:
    """Of metrics.jsonl, up to a step. Raises: Refused."""
    path = folder / "metrics.jsonl"
    try:
        return writers.rows_until(path, until)
    except Exception as error:  # those of gcsfs and google-auth are no OSError
        raise Refused(f"{path} can't be read ({manifest.reason(error)}): run the command again once it can.") from error


def chosen(checkpoints: Checkpoints, folder: epath.Path, step: int | str) -> int:
    """A checkpoint that verifies: of a step, the newest for -1, or the `best`, with the lowest held-out loss.

    Raises: Refused.
    """
    if step != "best":
        return checkpoints.choose(step)
    steps = checkpoints.steps()
    best = stopping.best(losses(folder), steps)
    if steps and not best:
        raise Refused(
            f"{folder / 'metrics.jsonl'} has no held-out loss of a step that has a checkpoint, so none is the best: give "
            f"one of {', '.join(map(str, steps))}."
        )
    return checkpoints.choose(best)


def load(folder: epath.Path, step: int | str) -> Run:
    """The model of a checkpoint: of a step, of the newest for -1, or of the `best`. Raises: Refused."""
    with hosts.together():
        latest = read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = chosen(checkpoints, folder, step)
        saved = checkpoints.run(step)
        config = configs.parse(saved["config"])
        its_tokenizer = saved_tokenizer(saved, f"{checkpoints.folder} (step {step})")
        mesh = mesh_that_fits(config, its_tokenizer.vocab_size)
        with jax.set_mesh(mesh):
            model = restore_model(checkpoints, step, config, its_tokenizer.vocab_size, mesh)
    return Run(config, step, mesh, model, its_tokenizer, configs.parse(latest))


def restore_model(
    checkpoints: Checkpoints, step: int, config: Config, vocab_size: int, mesh: jax.sharding.Mesh
) -> Transformer:
    """What is evaluated of a step, placed on the mesh in use.

    config: that of the step; of learned positions a shorter seq_len takes the first. Raises: Refused.
    """
    part = "ema" if config.optimizer.ema_decay else "model"
    shapes = {part: abstract_model(config, vocab_size)}
    if config.lora.rank:
        adapters = jax.eval_shape(lambda model: Adapters(model, config.lora, 0), shapes[part])
        shapes = {"base": shapes[part], part: adapters}
    found = checkpoints.restore(step, placed(shapes, mesh), cut=[f"{name}.positions" for name in shapes])
    return merged(found["base"], found[part]) if config.lora.rank else found[part]


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
