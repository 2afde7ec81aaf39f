#!/usr/bin/env bash
# One TPU worker's side of tpu_vm.py; it lies in the tree that tpu_vm.py ships.
#
#   worker.sh install            a virtual environment with gptjax
#   worker.sh start COMMAND…     ends what still runs, and starts the command so that it outlives this ssh session
#   worker.sh status             one line: gptjax HOST running|exited|lost CODE NANOSECONDS COMMAND…
#   worker.sh follow BYTE        the log from that byte on, until the command ends (exit code 0) or 5 minutes (124)
#   worker.sh tail HOST          on that host, the end of the log
#   worker.sh stop
#
# The command is a session of its own (setsid): no hangup reaches it, and all that it starts ends with it. Neither
# systemd-run (root) nor tmux (a package, and no exit code) is needed, so the same lines run on any Linux, and in tests.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$HOME/gptjax-run
mkdir -p "$run"

stop() {
  [[ -s $run/session ]] || return 0
  local session
  session=$(cat "$run/session")
  if [[ ! -e $run/exit ]] && kill -TERM -- "-$session" 2>/dev/null; then
    for _ in {1..300}; do # a checkpoint may be on its way
      if [[ -e $run/exit ]] || ! kill -0 -- "-$session" 2>/dev/null; then break; fi
      sleep 0.1
    done
  fi
  kill -KILL -- "-$session" 2>/dev/null || true
}

verb=$1
shift
case $verb in
  install)
    # uv brings a Python of its own: the images' may be older than 3.11, and has no venv.
    PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --quiet --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'
    ;;
  start)
    stop
    rm -f "$run/exit" "$run/process"
    if [[ -e $run/log ]]; then mv "$run/log" "$run/log.previous"; fi
    echo "$*" >"$run/command"
    setsid bash launch/worker.sh session "$@" </dev/null >"$run/log" 2>&1 &
    echo $! >"$run/session"
    until [[ -s $run/process ]]; do sleep 0.05; done
    ;;
  session) # what start puts around the command: it stays to tell the exit code, and when
    trap : TERM # is for the command to act on
    PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1 "$@" &
    echo $! >"$run/process"
    while code=0 && { wait $! || code=$?; } && kill -0 $! 2>/dev/null; do :; done # a signal ends the wait as well
    echo "$code $(date +%s%N)" >"$run/exit.part"
    mv "$run/exit.part" "$run/exit"
    ;;
  status)
    # The process first: one that ends between the two looks has left its exit code by the second.
    state="lost 0 0" # the session was killed, or the machine restarted and the number may be another process's now
    if [[ -s $run/session ]] && grep --quiet --no-messages worker.sh "/proc/$(cat "$run/session")/cmdline"; then
      state="running 0 0"
    fi
    if [[ -e $run/exit ]]; then state="exited $(cat "$run/exit")"; fi
    echo "gptjax $(hostname) $state $(cat "$run/command" 2>/dev/null || true)"
    ;;
  follow)
    timeout 300 tail --bytes="+$(($1 + 1))" --follow --sleep-interval=0.5 --pid="$(cat "$run/process")" "$run/log"
    ;;
  tail)
    if [[ $(hostname) == "$1" ]]; then tail --lines=40 "$run/log"; fi
    ;;
  stop)
    stop
    ;;
  *)
    echo "worker.sh: $verb is none of install, start, status, follow, tail, stop." >&2
    exit 2
    ;;
esac
