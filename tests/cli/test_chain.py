"""The whole way of a run in a folder whose path holds the signs that libraries read as patterns, URLs or homes."""

import os
import shutil

import pytest
from support.command import training


def give_away(folder):
    """Gives files to an owner whom the user database does not know, where this process may."""
    if not os.geteuid():
        for where, folders, files in os.walk(folder):
            for name in (".", *folders, *files):
                os.chown(os.path.join(where, name), 54321, 54321)


@pytest.mark.slow
def test_every_command_in_a_folder_of_signs(gptjax_main, corpus, tmp_path):
    here = tmp_path / "exp [a] %41#x?y ~"
    (here / "corpus [v2]").mkdir(parents=True)
    for path in corpus.parent.iterdir():
        shutil.copy(path, here / "corpus [v2]")
    give_away(here)

    def call(*argv):
        code, out, error = gptjax_main(*argv)
        assert code == 0, error
        give_away(here)
        return out

    run = training(here / "corpus [v2]" / "*.txt", here / "run")
    call(*run, "--config.num_steps=2")
    assert "going on from the checkpoint of step 2" in call(*run, "--config.num_steps=4")
    assert "verified" in call("checkpoint", "verify", f"--workdir={here}/run")
    call("eval", f"--workdir={here}/run")
    call("convert", "to-hf", f"--workdir={here}/run", f"--target={here}/hf")
    call("convert", "from-hf", f"--source={here}/hf", f"--workdir={here}/back")
    asked = "--prompt=ab", "--max_tokens=8", "--temperature=0"
    assert call("generate", f"--workdir={here}/run", *asked) == call("generate", f"--workdir={here}/back", *asked)
    assert os.listdir(tmp_path) == [here.name]
