"""Paths on the command line and in configs: home folders, patterns, and signs that a library can't take."""

import argparse
import dataclasses
import pathlib
import re

import pytest
from etils import epath

from gptjax.cli import main
from gptjax.data.sources import files as source_files
from gptjax.data.sources.documents import DataConfig
from gptjax.data.stream import mixture
from gptjax.errors import Refused
from gptjax.runtime import files
from gptjax.training.config import reference, resume, schema


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def flags(parser) -> dict[str, str]:
    """The help of each flag with a text value, of a parser and its commands."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= flags(sub)
        elif action.nargs is None and action.type is None and not action.choices:
            found[action.dest] = action.help or ""
    return found


def test_flags_that_are_paths_are_known():
    says = {
        name
        for name, text in flags(main.parser()).items()
        if re.match(r"(new )?(folder|file|Python file)|UTF-8 text", text)
    }
    assert says <= main.PATHS, says - main.PATHS
    assert main.PATHS <= flags(main.parser()).keys()


def test_keys_that_are_paths_are_known():
    keys = re.findall(
        r"^\| `(\S+)` \| `''` \| str \| (?:a |an existing )?(?:file|folder|workdir|tokenizer)", reference.page(), re.M
    )
    assert set(keys) - {"sample_prompt"} <= set(schema.PATHS), keys


def test_a_home_folder_is_expanded_everywhere(home):
    args = main.parse(["train", "--config=~/c.py", "--workdir=~/r"])
    assert (args.config, args.workdir) == (f"{home}/c.py", f"{home}/r")
    assert main.parse(["report", "~/a", "b"]).workdirs == [f"{home}/a", "b"]
    config = schema.parse({"data": {"store": "~/s", "path": "~/*.txt"}})
    assert (config.data.store, config.data.path) == (f"{home}/s", f"{home}/*.txt")
    assert mixture.folders("a=~/x, b=y") == {"a": epath.Path(f"{home}/x"), "b": epath.Path("y")}


def test_a_run_of_before_kept_the_sign(home):
    old = dataclasses.asdict(schema.parse({"data": {"path": "/x"}}))
    old["data"]["path"] = "~/*.txt"
    assert resume.differences(old, schema.parse({"data": {"path": "~/*.txt"}})) == []
    assert resume.differences(old, schema.parse({"data": {"path": "~/other"}}))


def test_a_folder_named_by_the_sign_is_reachable(home):
    assert files.user_path("./~/r") == "./~/r" and files.user_path("a/~") == "a/~"


def test_an_unknown_home_is_refused():
    with pytest.raises(Refused, match='"~nobody_of_that_name/r" begins with a home folder that is unknown: write'):
        main.parse(["status", "--workdir=~nobody_of_that_name/r"])


def test_a_backslash_is_refused(refused, corpus, tmp_path):
    refused(tmp_path, "train", "--config=configs/debug.py", f"--workdir={tmp_path}/a\\b")


def test_what_exists_is_no_pattern(tmp_path):
    """A path is taken literally as far as it exists, and as a pattern from there on."""
    folder = tmp_path / "corpus [v2]"
    folder.mkdir()
    names = ["part[0].jsonl", "part0.jsonl", "part1.jsonl"]
    for name in names:
        (folder / name).touch()
    paths = [epath.Path(folder / name) for name in sorted(names)]
    assert source_files.matching(str(folder / names[0])) == [paths[2]]
    assert source_files.matching(f"{folder}/*.jsonl") == source_files.matching(f"{tmp_path}//*/*") == paths
    assert source_files.matching(f"{tmp_path}/**/part[0-9].jsonl") == paths[:2]
    with pytest.raises(Refused) as refusal:
        source_files.sized(DataConfig(source="jsonl", path=str(folder)))
    assert len(source_files.matching(re.search(r'try "(.*)"', str(refusal.value))[1])) == 3


def test_status_of_a_run_in_a_folder_with_signs(gptjax_main, finished, tmp_path):
    import shutil

    for name in ("exp [lr=3e-4]", "a*b"):
        folder = pathlib.Path(shutil.copytree(finished, tmp_path / name))
        (folder / "hosts").mkdir(exist_ok=True)
        (folder / "hosts/0.json").write_text("{")
        code, out, _ = gptjax_main("status", f"--workdir={folder}")
        assert code == 0 and "0.json" in out
