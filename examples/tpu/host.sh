#!/usr/bin/env bash
# What launch.sh runs on the hosts of a TPU: host.sh STEP [ARGUMENT ...]
# OUTPUT is the run's folder, FOLDER its copy in the bucket, or - if there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The image's Python may be older than 3.11; uv brings a newer one.
install() {
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
  # Orbax reaches gs:// by way of gcsfs.
  python3 -m uv pip install --quiet --python .venv -e '.[examples]' 'jax[tpu]' gcsfs
}

# restore OUTPUT FOLDER: says --resume if the run exists. A preempted TPU has lost its
# disks; then the run comes from the bucket, config.json last, as the sign that it is
# whole.
restore() {
  local output=$1 folder=$2 found
  if [ "$folder" != - ] && [ ! -e "$output/config.json" ]; then
    found=$(gcloud storage objects list "$folder/config.json" '--format=value(name)')
    if [ -n "$found" ]; then
      mkdir -p "$output"
      gcloud storage rsync "$folder" "$output" --recursive '--exclude=^config\.json$' >&2
      gcloud storage cp "$folder/config.json" "$output/config.json" >&2
    fi
  fi
  if [ -e "$output/config.json" ]; then echo --resume; fi
}

# A training process holds a lock on OUTPUT.lock, with its process id in it.
running() {
  mkdir -p "$(dirname "$1")"
  ! flock --nonblock "$1.lock" true
}

# start OUTPUT FOLDER FLAG...: trains on when the connection that started it is gone.
start() {
  local output=$1
  if running "$output"; then
    echo "host.sh: error: $output is in training already; first run the step stop" >&2
    exit 2
  fi
  setsid bash examples/tpu/host.sh train "$@" </dev/null >>"$output.log" 2>&1 &
}

train() {
  local output=$1 folder=$2 python='' stopped='' pause
  shift 2
  exec 9>>"$output.lock"
  flock --nonblock 9
  trap 'stopped=yes; kill -TERM $python || true' TERM
  echo "$$" >"$output.lock"
  .venv/bin/python examples/pretrain.py --output "$output" "$@" &
  python=$!
  [ -z "$stopped" ] || kill -TERM "$python"
  while kill -0 "$python" 2>/dev/null; do
    sleep 30 9>&- &
    pause=$!
    wait -n "$python" "$pause" || true # or until TERM
    kill "$pause" 2>/dev/null || true
    upload "$output" "$folder"
  done
  upload "$output" "$folder"
}

# Only the first host writes results; only there is a config.json.
upload() {
  local output=$1 folder=$2 message
  if [ "$folder" != - ] && [ -e "$output/config.json" ]; then
    message=$(gcloud storage rsync "$output" "$folder" --recursive 2>&1) || echo "$message"
  fi
}

# stop OUTPUT: lets the trainer save and waits until all is done.
stop() {
  if running "$1"; then
    kill -TERM "$(cat "$1.lock")"
    flock "$1.lock" true
  fi
}

logs() {
  tail -n 100 -F "$1.log"
}

"$@"
