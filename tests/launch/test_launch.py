"""The launcher against a stand-in gcloud, and the manifests against their schemas. No network, no cloud."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from gptjax.cli import main

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
FAKES = {
    # The machines' commands that are not at hand, or must not be what they are here.
    "gcloud": f'exec {sys.executable} -S {ROOT}/tests/support/fake_gcloud.py "$@"',
    "hostname": 'echo "$FAKE_HOST"',
    "uv": 'if [ "$1" = venv ]; then mkdir -p .venv/bin; else cp "$CLOUD/gptjax" .venv/bin/gptjax; fi',
}
# A training run by its exit codes: $CLOUD/outcomes/HOST.START, else 0.
TRAIN = """#!/usr/bin/env bash
start=$(ls "$CLOUD" | grep -c "^started-$FAKE_HOST-") || true
touch "$CLOUD/started-$FAKE_HOST-$start"
echo "$FAKE_HOST start $start: $*"
outcome=$(cat "$CLOUD/outcomes/$FAKE_HOST.$start" 2>/dev/null || echo 0)
case $outcome in
  preempted)
    until [ -e "$CLOUD/followed-0" ]; do sleep 0.05; done
    sed -i 's/"states": [^]]*]/"states": ["SUSPENDED"]/' "$CLOUD/resource.json"
    touch "$CLOUD/ended"
    kill -KILL 0 ;; # the session, as when a machine is taken away
  lost) touch "$CLOUD/ended"; kill -KILL 0 ;;
  wait) until [ -e "$CLOUD/release" ]; do sleep 0.05; done ;;
  third) until [ -e "$CLOUD/followed-2" ]; do sleep 0.05; done ;;
  late*)
    until [ -e "$CLOUD/ended" ]; do sleep 0.05; done
    sleep 0.4 # what ended has still to be written down
    exit "${outcome#late}" ;;
  0) exit 0 ;;
  *) touch "$CLOUD/ended"; exit "$outcome" ;;
esac
"""
COMMAND = ["gptjax", "train", "--config=configs/debug.py", "--workdir=gs://bucket/run one"]
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository with what the launcher needs of this one."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("gptjax/__init__.py", "gptjax/errors.py", "configs/debug.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "tree"]):
        subprocess.run(git + words, check=True)
    return folder


class Cloud:
    def __init__(self, tree: pathlib.Path, folder: pathlib.Path):
        self.tree, self.folder, self.processes = tree, folder, []
        bin_folder = folder / "bin"
        (folder / "outcomes").mkdir(parents=True)
        bin_folder.mkdir()
        for name, line in FAKES.items():
            (bin_folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (bin_folder / name).chmod(0o755)
        (folder / "gptjax").write_text(TRAIN)
        (folder / "gptjax").chmod(0o755)
        self.environment = os.environ | {"CLOUD": str(folder), "PATH": f"{bin_folder}:{os.environ['PATH']}"}

    def play(self, workers=2, states=(("ACTIVE",),), outcomes=None, **more):
        (self.folder / "play.json").write_text(json.dumps({"workers": workers, "states": states} | more))
        for start, outcome in (outcomes or {}).items():
            (self.folder / "outcomes" / start).write_text(str(outcome))

    def start(self, *flags, command=COMMAND):
        words = [sys.executable, str(self.tree / "launch/tpu_vm.py"), "--zone=z", "--poll=0.05", *flags, "--", *command]
        self.processes.append(
            subprocess.Popen(words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return self.processes[-1]

    def launch(self, *flags, command=COMMAND):
        """Returns: (exit code, stdout, stderr without its times)."""
        process = self.start(*flags, command=command)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, "".join(line.split("] ", 1)[-1] for line in err.splitlines(keepends=True))

    def calls(self):
        file = self.folder / "calls.jsonl"
        return [json.loads(line)[2:] for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self):
        """Of the calls that change something."""
        verbs = [(verb, *rest) for _, verb, *rest in self.calls() if verb != "describe"]
        known = {"create": "create", "delete": "delete", "scp": "scp", "ssh": None}
        found = []
        for verb, *rest in verbs:
            remote = next((word for word in rest if word.startswith("--command=")), "")
            remote = next(
                (name for name in ("install", "start ", "tail ", "stop") if f"worker.sh {name}" in remote), ""
            )
            found += [known[verb] or remote.strip()]
        return [verb for verb in found if verb]


@pytest.fixture
def cloud(tree, tmp_path):
    made = Cloud(tree, tmp_path / "cloud")
    yield made
    for process in made.processes:
        process.kill()
    for pid in made.folder.glob("machines/*/gptjax-run/session"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


ONE = ("--name=one", "--type=v5p-16")
PAIR = ("--name=pair", "--type=v5p-16", "--slices=2", "--spot")
QUEUE = ("WAITING_FOR_RESOURCES", "ACTIVE")


def test_a_run_of_two_slices_survives_a_preemption(cloud):
    cloud.play(states=[QUEUE, QUEUE], outcomes={"pair-1-w-0.0": "preempted", "pair-0-w-0.0": "late134"})
    code, out, err = cloud.launch(*PAIR)
    assert code == 0
    line = "--config=configs/debug.py --workdir=gs://bucket/run one"
    assert out == f"pair-0-w-0 start 0: train {line}\npair-0-w-0 start 1: train {line}\n"
    words = [
        "creating pair: 2 × v5p-16, 16 chips, spot",
        "pair is WAITING_FOR_RESOURCES",
        "pair is ACTIVE",
        "shipping to 4 workers, and installing",
        "starting gptjax train --config=configs/debug.py '--workdir=gs://bucket/run one'",
        "preempted: the run goes on from its last checkpoint on a new resource",
        "pair is SUSPENDED",
        "deleting pair",
    ]
    assert err.splitlines()[1:] == words + words[:5] + ["the command has ended well", "deleting pair"]
    both = ["scp"] * 2 + ["install"] * 2 + ["start"] * 2
    assert cloud.verbs() == ["create", *both, "delete", "create", *both, "delete"]
    create = next(rest for _, verb, *rest in cloud.calls() if verb == "create")
    assert create == (
        "pair --node-count=2 --node-prefix=pair --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot "
        "--zone=z --quiet"
    ).split(" ")

    real = [["gcloud", "compute", "tpus", *call] for call in cloud.calls()]
    (cloud.folder / "calls.jsonl").unlink()
    code, out, _ = cloud.launch(*PAIR, "--dry-run=preemption")
    assert code == 0 and not cloud.calls()

    def summary(commands):
        """Two nodes are asked at once, in either order, and looked at as often as it takes until both have ended; the
        tarball lies in another folder each time."""
        lines = [" ".join(word for word in words if not word.endswith("/gptjax.tar.gz")) for words in commands]
        looks = {line for line in lines if "worker.sh status" in line}
        again = re.compile("worker.sh follow [1-9]")
        return sorted(looks), sorted(line for line in lines if line not in looks and not again.search(line))

    assert summary(real) == summary(shlex.split(line) for line in out.splitlines())


@pytest.mark.parametrize("outcome, words", [(75, "ended with exit code 75"), ("lost", "was lost")])
def test_exit_code_75_starts_the_command_again_where_it_is(cloud, outcome, words):
    cloud.play(outcomes={"one-w-1.0": outcome, "one-w-0.0": "late134", "one-w-1.1": "third"})
    code, out, err = cloud.launch(*ONE)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["one-w-0 start 0", "one-w-0 start 1"]
    assert f"one-w-1 of one {words}\n" in err
    assert cloud.verbs() == ["create", "scp", "install", "start", "start", "delete"]


def test_a_command_that_ends_while_it_is_asked_after_is_not_lost(cloud):
    """A grep that lets the command end, and only then looks for its process."""
    look = 'touch "$CLOUD/release"; until [ -e "$HOME/gptjax-run/exit" ]; do sleep 0.05; done; sleep 0.2'
    grep = cloud.folder / "bin" / "grep"
    grep.write_text(f'#!/bin/sh\ncase $1 in --quiet) {look} ;; esac\nexec {shutil.which("grep")} "$@"\n')
    grep.chmod(0o755)
    cloud.play(outcomes={"one-w-1.0": "wait"})
    code, _, err = cloud.launch(*ONE)
    assert code == 0 and "was lost" not in err
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]


def test_exit_code_75_without_end_is_given_up(cloud):
    cloud.play(workers=1, outcomes={f"one-w-0.{start}": 75 for start in range(9)})
    code, out, err = cloud.launch(*ONE)
    assert code == 75 and out.count("one-w-0 start") == 4  # and once more as the end of the log
    assert "one-w-0 of one ended with exit code 75, 3 times in a row within 10 minutes of a start" in err
    assert cloud.verbs() == ["create", "scp", "install"] + ["start"] * 3 + ["tail", "delete"]


def test_the_first_worker_to_fail_is_named_and_its_log_shown(cloud):
    cloud.play(outcomes={"pair-1-w-1.0": 3, "pair-0-w-0.0": "late134", "pair-0-w-1.0": "late134"}, workers=2)
    code, out, err = cloud.launch(*PAIR, "--keep")
    assert code == 3
    assert [line.split(":")[0] for line in out.splitlines()] == ["pair-0-w-0 start 0", "pair-1-w-1 start 0"]
    assert "given up: pair-1-w-1 of pair-1 ended with exit code 3\n" in err
    assert "gcloud compute tpus queued-resources delete pair --force --zone=z --quiet" in err.splitlines()[-1]
    assert sorted(set(cloud.verbs())) == ["create", "install", "scp", "start", "stop", "tail"]


def test_a_worker_that_was_not_reached_is_noticed_though_gcloud_says_nothing(cloud):
    cloud.play(silent="one-w-1")
    code, _, err = cloud.launch(*ONE)
    assert code == 1 and "given up: one is ACTIVE but can't be used: 1 of 2 workers did it" in err
    assert cloud.verbs() == ["create", "delete"]


@pytest.mark.parametrize(
    "play, words, verbs",
    [
        (
            {"states": [["PROVISIONING", "FAILED"]]},
            "the request for one failed: no more capacity",
            ["create", "delete"],
        ),
        ({"refuse": "RESOURCE_EXHAUSTED: quota of 8 cores"}, "RESOURCE_EXHAUSTED: quota of 8 cores", ["create"]),
    ],
)
def test_no_resource_is_to_be_had(cloud, play, words, verbs):
    cloud.play(**play)
    code, _, err = cloud.launch(*ONE)
    assert code == 1 and words in err and "still exists" not in err
    assert cloud.verbs() == verbs


def test_what_an_earlier_launch_left_is_deleted_first(cloud):
    cloud.play(workers=1, stubborn=True)
    left = {"states": ["SUSPENDED"], "nodes": ["one"], "type": "v5p-16"}
    (cloud.folder / "resource.json").write_text(json.dumps(left))
    code, _, err = cloud.launch(*ONE)
    assert code == 0 and "trying again in 0.05 s: ERROR: (gcloud.compute.tpus) UNAVAILABLE: try again" in err
    assert cloud.verbs() == ["delete", "delete", "create", "scp", "install", "start", "delete"]


def test_control_c_leaves_the_run_and_the_same_command_follows_it_again(cloud):
    cloud.play(workers=1, outcomes={"one-w-0.0": "wait"})
    process = cloud.start(*ONE)
    first = "one-w-0 start 0: train --config=configs/debug.py --workdir=gs://bucket/run one\n"
    assert process.stdout.readline() == first
    session = int((cloud.folder / "machines/one-w-0/gptjax-run/session").read_text())
    assert os.getsid(session) == session  # no hangup reaches it
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "one still exists, and is billed" in err
    assert err.splitlines()[-1].strip() == "gcloud compute tpus queued-resources delete one --force --zone=z --quiet"

    code, _, err = cloud.launch(*ONE, command=[*COMMAND, "--config.num_steps=7"])
    assert (
        code == 2 and "one is busy with 'gptjax train --config=configs/debug.py --workdir=gs://bucket/run one'" in err
    )
    code, _, err = cloud.launch("--name=one", "--type=v5p-8")
    assert code == 2 and "one exists and is 1 × v5p-16, not 1 × v5p-8" in err
    cloud.play(workers=1, silent="one-w-0")
    code, _, err = cloud.launch(*ONE)
    assert code == 1 and "given up: 0 of 1 workers did it" in err and "one still exists" in err
    assert "delete" not in cloud.verbs()  # others may well reach it

    cloud.play(workers=1)
    process = cloud.start(*ONE)
    assert process.stdout.readline() == first
    (cloud.folder / "release").touch()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "") and "one is running this command already" in err
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]


def test_a_big_slice_is_reached_in_batches(cloud):
    code, out, _ = cloud.launch("--name=big", "--type=v5p-384", "--dry-run")
    starts = [line for line in out.splitlines() if "worker.sh start" in line]
    assert code == 0 and [line.split("--worker=")[1].split()[0] for line in starts] == ["0-31", "32-47"]


def replaced(word, new):
    return [new if part.startswith(word) else part for part in COMMAND]


@pytest.mark.parametrize(
    "flags, command, words",
    [
        (["--name=one", "--type=v5p:4x4x4"], COMMAND, "give the accelerator type of so many chips, v5p-128"),
        (["--name=one", "--type=v5e-16"], COMMAND, "is called v5litepod-16"),
        (["--name=one", "--type=v6e-100"], COMMAND, "the number of chips of v6e must be 1, 4, 8, 16, 32, 64, 128, 256"),
        (["--name=one", "--type=v5p-100"], COMMAND, "must be 8, 16, 32, 64 or a multiple of 128"),
        (["--name=one", "--type=v6-64"], COMMAND, 'Did you mean "v6e"?'),
        (["--name=One", "--type=v5p-8"], COMMAND, "--name=One must be lower-case"),
        (["--name=one", "--type=v5p-8", "--slices=0"], COMMAND, "--slices=0 must be at least 1"),
        (["--name=one", "--type=v5p-8", "--spot", "--reserved"], COMMAND, "not allowed with argument"),
        (["--name=one"], COMMAND, "--type"),
        ([*ONE], [], "Nothing follows --"),
        ([*ONE], replaced("--workdir", "--workdir=/data/run"), "--workdir=/data/run must be gs://BUCKET/FOLDER"),
        ([*ONE], replaced("--workdir", "--workdir=gs://bucket"), "--workdir=gs://bucket must be gs://BUCKET/FOLDER"),
        (
            [*ONE],
            replaced("--config", "--config=configs/new.py"),
            "--config=configs/new.py must be a file that git tracks",
        ),
    ],
)
def test_refused_before_gcloud_is_called(cloud, flags, command, words):
    code, out, err = cloud.launch(*flags, command=command)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert not cloud.calls()


def test_without_gcloud(cloud):
    (cloud.folder / "bin" / "gcloud").unlink()
    (cloud.folder / "bin" / "git").symlink_to(shutil.which("git"))
    cloud.environment["PATH"] = f"{cloud.folder}/bin"
    code, _, err = cloud.launch(*ONE)
    assert code == 2 and "gcloud is not on the PATH" in err


def test_without_a_repository(cloud, tmp_path):
    shutil.copytree(cloud.tree, tmp_path / "tree", ignore=shutil.ignore_patterns(".git"))
    cloud.tree = tmp_path / "tree"
    code, _, err = cloud.launch(*ONE)
    assert code == 2 and f"git can't read {cloud.tree}" in err and not cloud.calls()


def test_help(cloud):
    code, out, _ = cloud.launch("--help")
    assert code == 0 and "exit codes:" in out and "python launch/tpu_vm.py --name=" in out


# ---- the other ways


def jobset():
    return pytest.importorskip("yaml").safe_load((LAUNCH / "gke/jobset.yaml").read_text())


def skypilot():
    return pytest.importorskip("yaml").safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_parts_of_the_jobset_fit_together():
    (part,) = jobset()["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] == job["completions"] == math.prod(map(int, sides)) // chips
    assert pod["restartPolicy"] == "Never"  # Kubernetes wants it for a podFailurePolicy
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [{"containerName": container["name"], "operator": "In", "values": [75, 143]}]
    (rule,) = jobset()["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    gptjax, *words = container["command"]
    args = main.parse(words)
    assert (gptjax, args.verb) == ("gptjax", "train") and args.workdir.startswith("gs://")
    assert (ROOT / args.config).exists()


@pytest.mark.slow
def test_the_job_in_the_jobset_is_valid_for_kubernetes():
    validate = pytest.importorskip("kubernetes_validate")
    (part,) = jobset()["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": part["name"]}} | part["template"]
    validate.validate(job, validate.latest_version(), strict=True)


def test_the_skypilot_task_is_valid_for_skypilot():
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(skypilot(), schemas.get_task_schema())
    jsonschema.validate(skypilot()["resources"], schemas.get_resources_schema())


def test_the_skypilot_task_starts_a_process_a_node(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/gptjax").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / ".venv/bin/gptjax").chmod(0o755)
    given = {"CONFIG": "c.py", "WORKDIR": "gs://bucket/a run", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    given |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-c", skypilot()["run"]], cwd=tmp_path, env=os.environ | given, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.splitlines() == [
        "train",
        "--config=c.py",
        "--workdir=gs://bucket/a run",
        "--coordinator=10.0.0.1:8476",
        "--num_processes=2",
        "--process_id=1",
    ]


@pytest.mark.parametrize(
    "codes, restarts, requeued, left",
    [
        ((0, 0), 0, False, 0),
        ((75, 137), 0, True, 0),
        ((134, 143), 3, True, 0),
        ((1, 134), 0, False, 134),
        ((75, 75), 100, False, 75),
    ],
)
def test_slurm_requeues_after_exit_code_75_and_sigterm_only(tmp_path, codes, restarts, requeued, left):
    fakes = {
        # srun: the tasks one after the other, with the highest of their codes.
        "srun": 'shift; most=0; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; code=$?; '
        "[ $code -gt $most ] && most=$code; done; exit $most",
        "scontrol": 'echo "scontrol $*"',
        # Slurm signals all processes of a task, the shell around the command too.
        "gptjax": 'kill -TERM $PPID; sleep 0.1; echo "gptjax $*"; '
        f'[ "$SLURM_PROCID" = 0 ] && exit {codes[0]}; exit {codes[1]}',
    }
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, line in fakes.items():
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", str(LAUNCH / "slurm/train.sbatch"), "--config=c.py", "--workdir=/shared/a run"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == left
    assert done.stdout.splitlines()[:2] == ["gptjax train --config=c.py --workdir=/shared/a run"] * 2
    assert ("scontrol requeue 7" in done.stdout) == requeued
    assert not list(tmp_path.glob(".try-again*")) or restarts == 100


def test_shell_scripts_pass_shellcheck():
    beside = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside)
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    files = [LAUNCH / "worker.sh", LAUNCH / "slurm/train.sbatch"]
    subprocess.run([shellcheck, *map(str, files)], check=True)
    for part in ("setup", "run"):
        subprocess.run([shellcheck, "--shell=bash", "-"], input=skypilot()[part], text=True, check=True)


def test_the_image_gets_what_it_copies():
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied == {word[1:] for word in ignore if word.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
