"""The scripts that run on every host. Data never becomes their text unquoted.

A folder travels to each host (`files_of`):
  code.tar.gz   the checkout, with posttrain/REVISION
  job.yaml      the resolved config of the job
  run.sh        unpacks, runs setup.sh, then the job, and passes signals and exit codes on
  setup.sh      the description's `setup`, if there is one
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from posttrain.cli import PREEMPTED, USAGE_ERROR

ARCHIVE = "code.tar.gz"

# $1 job; RETRIES: restarts here after a failure; FREE=1: after a preemption of other hosts too.
# SIGTERM may come at any time and is passed on: to the set-up as well, and then nothing is
# restarted. A set-up that fails exits with 1: tar, bash and pip use 2, which would end the job as
# a config error does.
RUN = f"""\
#!/usr/bin/env bash
# run.sh JOB: what travelled -> the job. Exits with the job's code; with {PREEMPTED} if it is told
# to stop before the job began.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export WORK=${{WORK:-/tmp/posttrain}}
child= told= cut= failures=0
trap 'told=1 cut=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

supervise() {{ # runs a command -> code; a signal cuts `wait` short, so it is asked again
  "$@" & child=$!
  [ -z "$told" ] || kill -TERM "$child" 2>/dev/null
  code=
  while :; do
    cut=
    wait "$child"; got=$?
    [ "$got" -eq 127 ] && [ -n "$code" ] || code=$got
    [ -n "$cut" ] || break
  done
  child=
  [ -z "$told" ] || [ "$code" -ne 143 ] || code={PREEMPTED}
}}

prepare() {{
  rm -rf "$WORK/code" && mkdir -p "$WORK/code" || return 1
  tar -xzf "$here/{ARCHIVE}" -C "$WORK/code" && cd "$WORK/code" || return 1
  [ ! -f "$here/setup.sh" ] || exec bash "$here/setup.sh"
}}

supervise prepare
if [ "$code" -ne 0 ]; then
  [ -z "$told" ] || exit {PREEMPTED}
  echo "run.sh: the set-up failed with exit code $code" >&2
  exit 1
fi
python=python3
[ ! -x "$WORK/venv/bin/python" ] || python=$WORK/venv/bin/python
cd "$WORK/code" || exit 1
export PYTHONPATH="$WORK/code${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONUNBUFFERED=1
while :; do
  [ -z "$told" ] || exit {PREEMPTED}
  supervise "$python" -m posttrain.cli "$1" "$here/job.yaml"
  if [ "$code" -eq 0 ] || [ "$code" -eq {USAGE_ERROR} ] || [ -n "$told" ]; then exit "$code"; fi
  if [ "$code" -ne {PREEMPTED} ]; then
    failures=$((failures + 1))
    [ "$failures" -le "${{RETRIES:-0}}" ] || exit "$code"
  elif [ "${{FREE:-0}}" != 1 ]; then
    exit "$code"
  fi
  echo "run.sh: exit code $code; again, $failures of ${{RETRIES:-0}} retries used" >&2
  sleep "${{PAUSE:-10}}"
done
"""

# for machines: images of TPU VMs have Python 3.10, too old
SETUP = """\
set -e
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11) || {
  sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv
  python=python3.11
}
[ -x "$WORK/venv/bin/python" ] || "$python" -m venv "$WORK/venv"
"$WORK/venv/bin/python" -m pip install --quiet '.[gcs]' 'jax[tpu]' -c constraints.txt
"""


def exports(variables: Mapping[str, str]) -> str:
    """Lines of bash that export the variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
