"""A stand-in for gcloud: a cloud in a folder, $CLOUD, whose machines are folders and whose ssh is bash.

What it does not play, it does not need: worker.sh, the tarball and the command run for real in each machine's folder.
$CLOUD/play.json says what happens:
    workers   machines of a slice
    states    for each request, the states that it is seen in, one after the other; the last one stays
    refuse    what `create` says, if it fails
    stubborn  whether the first `delete` fails
    silent    the host whose commands are not run, though gcloud exits with 0 (as the real one does at times)
calls.jsonl has each command line, and each time that a log is followed leaves a file followed-N.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["CLOUD"])
PLAY = json.loads((CLOUD / "play.json").read_text())
STATE = CLOUD / "resource.json"


def fail(text: str):
    print(f"ERROR: (gcloud.compute.tpus) {text}", file=sys.stderr)
    sys.exit(1)


def end_machines():
    for pid in CLOUD.glob("machines/*/gptjax-run/session"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(CLOUD / "machines", ignore_errors=True)


def queued_resources(verb: str, name: str, flags: dict):
    if verb == "create":
        if "refuse" in PLAY:
            fail(PLAY["refuse"])
        nodes = [flags["--node-id"]] if "--node-id" in flags else []
        nodes += [f"{flags['--node-prefix']}-{number}" for number in range(int(flags.get("--node-count", 0)))]
        request = len(list(CLOUD.glob("request-*")))
        (CLOUD / f"request-{request}").touch()
        STATE.write_text(
            json.dumps({"states": PLAY["states"][request], "nodes": nodes, "type": flags["--accelerator-type"]})
        )
        for node in nodes:
            for worker in range(PLAY["workers"]):
                (CLOUD / "machines" / f"{node}-w-{worker}").mkdir(parents=True)
    elif not STATE.exists():
        fail(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found")
    elif verb == "describe":
        found = json.loads(STATE.read_text())
        state = {"state": found["states"][0]}
        if state["state"] == "FAILED":
            state["failedData"] = {"error": {"message": "no more capacity in the zone"}}
        specs = [{"nodeId": node, "node": {"acceleratorType": found["type"]}} for node in found["nodes"]]
        print(json.dumps({"state": state, "tpu": {"nodeSpec": specs}}))
        found["states"] = found["states"][1:] or found["states"]
        STATE.write_text(json.dumps(found))
    elif verb == "delete":
        if PLAY.get("stubborn") and not (CLOUD / "asked").exists():
            (CLOUD / "asked").touch()
            fail("UNAVAILABLE: try again")
        STATE.unlink()
        end_machines()


def tpu_vm(verb: str, words: list, flags: dict):
    states = json.loads(STATE.read_text())["states"] if STATE.exists() else []
    if states != ["ACTIVE"]:
        fail("This TPU has state PREEMPTED, so it cannot be used")
    if verb == "describe":
        print(json.dumps({"networkEndpoints": [{}] * PLAY["workers"]}))
        return
    node = words[-1].partition(":")[0]
    workers = range(PLAY["workers"]) if flags["--worker"] == "all" else [int(flags["--worker"])]
    running = []
    for worker in workers:
        host = f"{node}-w-{worker}"
        home = CLOUD / "machines" / host
        if verb == "scp":
            shutil.copy(words[0], home / words[1].partition(":")[2])
        elif host != PLAY.get("silent"):
            environment = os.environ | {"HOME": str(home), "FAKE_HOST": host}
            running.append(subprocess.Popen(["bash", "-c", flags["--command"]], cwd=home, env=environment))
    if "follow" in flags.get("--command", ""):
        (CLOUD / f"followed-{len(list(CLOUD.glob('followed-*')))}").touch()
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))


def main():
    with open(CLOUD / "calls.jsonl", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    compute, tpus, group, verb, *rest = sys.argv[1:]
    assert (compute, tpus) == ("compute", "tpus")
    flags = dict(word.partition("=")[::2] for word in rest if word.startswith("--"))
    words = [word for word in rest if not word.startswith("--")]
    if group == "queued-resources":
        queued_resources(verb, words[0], flags)
    else:
        tpu_vm(verb, words, flags)


if __name__ == "__main__":
    main()
