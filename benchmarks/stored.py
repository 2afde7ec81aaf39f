"""The readers of folders, for benchmarks/fuzz.py: token stores, tokenizers, checkpoints, signs of life."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np
from etils import epath
from hypothesis import strategies as st

from benchmarks import hostile
from benchmarks.readers import CONFIG, Reader
from gptjax.checkpoints import (
    manager,  # fmt: skip
    manifest,
    retention,
)
from gptjax.checkpoints.record import Progress, Recovery, RunRecord
from gptjax.data.store import store as stores
from gptjax.data.stream import curriculum, mixture, stream
from gptjax.errors import Refused
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.runtime import heartbeat
from gptjax.tokenizers import huggingface, tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training import loading, resume_point
from gptjax.training.config import schema
from gptjax.training.monitoring import skipped_batches, status

TEXTS = [f"def f{i}(x):\n    return x + {i}  # the quick brown fox, étude {i}\n" for i in range(200)]


def small_store(folder: pathlib.Path) -> tuple[dict, dict[str, bytes]]:
    """(manifest, the other files) of a store in `folder`; its shards and their parts are small, so that it has some."""
    stores.SHARD, stores.CHUNK = 64, 16
    made = tokenizer.train(TokenizerConfig(kind="byte"), [], folder / "tokenizer")
    splits = {}
    for name in stores.SPLITS:
        writer = stores.SplitWriter(epath.Path(folder / name), np.uint16)
        for index, text in enumerate(TEXTS[:3]):
            tokens = np.concatenate([[made.end_of_text], made.encode(text)])
            writer.append(f"{index}.txt", 0, tokens, len(text.encode()))
        splits[name] = writer.close()
    sizes = dict.fromkeys(("compressed_heldout_bytes", "gzip_bytes", "xz_bytes"), 100)
    manifest = {"settings": {}, "tokenizer_hash": made.hash, "vocab_size": 257, "text_hash": "0" * 64}
    stores.write_manifest(epath.Path(folder), manifest | {"splits": splits} | sizes)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return json.loads(files.pop("manifest.json")), files


def read_store(folder: pathlib.Path):
    """All that is read of a store: batches, and where documents start. What `Split.read` documents is a refusal."""
    store = stores.Store.open(folder)
    phases = [curriculum.Phase(0, 32, 2, {"": mixture.PERIOD})]
    try:
        data = stream.Stream(mixture.Corpus({"": store}), phases, 32, seed=0)
        data.batch(3, np.arange(2))
        data.documents(3)
        stream.heldout_batches(store, seq_len=32, batch_size=2, rows=np.arange(2))[0]
        return [split.document_starts() for split in store.splits.values()]
    except ValueError as error:
        raise Refused(str(error)) from error


def store_manifest(folder: pathlib.Path) -> Reader:
    manifest, _ = small_store(folder / "store")

    def place(given) -> None:
        hostile.put(folder / "store" / "manifest.json", given)

    return Reader(hostile.json_files(manifest) | hostile.NO_FILES, lambda _: read_store(folder / "store"), place)


def store_files(folder: pathlib.Path) -> Reader:
    """Each file of a store: as a bad disk leaves it, and as who also mends checksums and the manifest's lengths."""
    store = folder / "store"
    manifest, files = small_store(store)
    put = hostile.one_at_a_time(store, files)

    def place(given):
        name, content, mended = given
        if mended and isinstance(content, bytes):
            content = hostile.sealed(content, stores.SHARD // stores.CHUNK) if "/c/" in name else content
            lengths = manifest["files"] | {name: len(content)}
            (store / "manifest.json").write_text(json.dumps(manifest | {"files": lengths}))
        else:
            (store / "manifest.json").write_text(json.dumps(manifest))
        put(name, content)

    def inputs(name):
        kinds = hostile.damaged(files[name]) | hostile.damaged(files[name]) | hostile.NO_FILES
        if name.endswith(".json"):
            kinds = hostile.json_files(json.loads(files[name])) | kinds
        return st.tuples(st.just(name), kinds, st.booleans())

    return Reader(st.sampled_from(sorted(files)).flatmap(inputs), lambda _: read_store(store), place)


def tokenizer_files(folder: pathlib.Path) -> Reader:
    folder = folder / "tokenizer"
    tokenizer.train(TokenizerConfig(vocab_size=320), TEXTS, folder)
    model = (folder / "sentencepiece.model").read_bytes()
    description = {"kind": "sentencepiece"}

    def place(given):
        for name, content in zip(tokenizer.FILES, given, strict=False):
            hostile.put(folder / name, content)

    def read(_):
        made = tokenizer.load(folder)
        ids = made.encode("def f1(x):\n\treturn \u2581 \U0001f600" * 20)
        return made.decode(ids), made.decode(range(made.vocab_size)), made.token_bytes[ids]

    models = hostile.damaged(model) | hostile.messages(model) | hostile.NO_FILES
    whole = st.just(json.dumps(description).encode())
    given = st.tuples(whole, models) | st.tuples(whole, models) | st.tuples(
        hostile.json_files(description) | hostile.NO_FILES, st.just(model)
    )  # fmt: skip
    return Reader(given, read, place)


def huggingface_files(folder: pathlib.Path) -> Reader:
    """A tokenizer.json of Hugging Face: byte-level BPE, and Unigram with bytes to fall back to."""
    folder = folder / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "huggingface", "special_tokens": ["<new>"]}))
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [flags | dict(id=0, content="</s>", special=True), flags | dict(id=300, content="  ", special=False)]
    regex = {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}
    characters = sorted(huggingface.BYTE_OF)
    vocab = {"</s>": 0} | {chr(char): i for i, char in enumerate(characters, 1)} | {"re": 257, "tu": 258, "retu": 259}
    merges = [["r", "e"], ["t", "u"], ["re", "tu"]]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    pieces = [["</s>", 0.0], *([f"<0x{byte:02X}>", -9.0] for byte in range(256)), ["\u2581re", -1.0], ["n", -2.0]]
    files = [
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
         "pre_tokenizer": {"type": "Sequence", "pretokenizers": [regex, level]}, "post_processor": None,
         "decoder": {"type": "ByteLevel"}, "model": bpe | {"vocab": vocab, "merges": merges}},
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added[:1], "normalizer": None,
         "pre_tokenizer": metaspace, "post_processor": None, "decoder": None,
         "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True}},
    ]  # fmt: skip
    # A change that is drawn anywhere falls on the many pieces, so the other parts are also changed alone.
    parts = [
        hostile.changed({key: value for key, value in file.items() if key != "model"}).map(
            lambda parts, file=file: json.dumps({**file, **parts}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        )
        for file in files
    ]
    given = st.one_of(*parts, *map(hostile.json_files, files), hostile.NO_FILES)

    def read(_):
        made = tokenizer.load(folder)
        ids = made.encode("return\tdef  f1(x):\n </s><0x41> return \u2581 \U0001f600" * 20)
        return made.decode(ids), made.decode(range(made.vocab_size)), made.token_bytes[ids]

    return Reader(given, read, lambda given: hostile.put(folder / "huggingface.json", given))


def read_status(folder: pathlib.Path) -> Reader:
    """The beats of two processes, one of which is tried, as `gptjax status` shows them."""
    beat = heartbeat.Beat(0, "here", 1, "training", "", 3, 4, True, 0.5, 2.0, 1.0, 1e9)
    beat = dataclasses.asdict(beat)
    (folder / heartbeat.FOLDER).mkdir()
    for process in range(2):
        (folder / heartbeat.FOLDER / f"{process}.json").write_text(json.dumps(beat | {"process": process}))

    def read(_):
        found = status.status(epath.Path(folder))
        if found["unreadable"]:
            raise Refused(status.text(found))
        return status.text(found)

    def place(given) -> None:
        hostile.put(folder / heartbeat.FOLDER / "0.json", given)

    return Reader(hostile.json_files(beat) | hostile.NO_FILES, read, place)


def small_checkpoint(folder: pathlib.Path) -> tuple[dict, dict[str, bytes], dict]:
    """(manifest, files, state) of a checkpoint of step 3 in `folder`."""
    files = {"tokenizer.json": b'{"kind": "byte"}'}
    recovery = Recovery([{"step": 1, "first_batch": 1, "num_batches": 2, "reason": "a spike"}], [2.5])
    progress = Progress(recovery, schema.parse({}).phases)
    run = RunRecord(CONFIG, tokenizer.hash_of(files), {"": "0" * 64}, files, progress)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = jax.device_put({"step": np.int32(3), "weight": np.ones((8, 4))}, jax.NamedSharding(mesh, jax.P()))
    with manager.Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state, run)
        checkpoints.wait()
    where = retention.at(epath.Path(folder), 3)
    described = manifest.read(where, 3)
    return described, {name: (where / name).read_bytes() for name in described["files"]}, state


def sealed_manifest(content) -> bytes:
    """A manifest that tells its own hash, as one that somebody wrote on purpose would."""
    try:
        return manifest._encoded(content)
    except (TypeError, ValueError):
        return json.dumps(content).encode()


def checkpoint_manifest(folder: pathlib.Path) -> Reader:
    described, _, _ = small_checkpoint(folder)

    def read(_):
        with manager.Checkpoints(folder) as checkpoints:
            step = checkpoints.newest()
            saved = checkpoints.record(step)
        if saved.progress is not None:
            batch = skipped_batches.batch_index(saved.progress.recovery.ledger, step)
            curriculum.starts(curriculum.going_on(saved.progress.phases, schema.parse({}).phases, batch))
        with contextlib.suppress(Refused):
            resume_point.check_same_run(schema.parse({}), saved.config, folder)
        return schema.parse(saved.config), loading.saved_tokenizer(saved, str(folder))

    whole = {key: value for key, value in described.items() if key != "sha256"}
    inputs = hostile.changed(whole).map(sealed_manifest) | hostile.json_files(described) | hostile.NO_FILES
    file = folder / "step_00000003" / manifest.NAME
    return Reader(inputs, read, lambda given: hostile.put(file, given))


def checkpoint_files(folder: pathlib.Path) -> Reader:
    """Each file of a checkpoint's state: as a bad disk leaves it, and as who also mends the manifest."""
    described, files, state = small_checkpoint(folder)
    where = folder / "step_00000003"
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    put = hostile.one_at_a_time(where, files)

    def place(given):
        name, content, mended = given
        changed = described["files"]
        if mended and isinstance(content, bytes):
            changed = changed | {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        hostile.put(where / manifest.NAME, sealed_manifest(described | {"files": changed}))
        put(name, content)

    def read(_):
        with manager.Checkpoints(folder) as checkpoints:
            return checkpoints.restore(checkpoints.newest(), wanted)

    def inputs(name):
        return st.tuples(st.just(name), hostile.damaged(files[name]) | hostile.NO_FILES, st.booleans())

    return Reader(st.sampled_from(sorted(files)).flatmap(inputs), read, place)
