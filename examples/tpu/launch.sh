#!/usr/bin/env bash
# Trains on a Cloud TPU from your own machine; see --help, and README.md beside it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
  cat <<'END'
usage: launch.sh [OPTION ...] STEP [STEP ...] [-- FLAG ...]

Trains with examples/pretrain.py on a Cloud TPU, whether of one host or of many.

steps, done in the order given:
  create   ask for the TPU, then wait until it is there
  wait     wait on, after Ctrl-C
  install  copy this checkout to all hosts and install it there
  train    start the run on all hosts, or continue it if it exists; does not wait
  logs     follow the messages of the first host; Ctrl-C ends only that
  stop     let the run save its state and end
  fetch    copy the results to runs/RUN here
  delete   give the TPU back, with its disks

options, each with an environment variable for its default:
  --name NAME     of the TPU                     TPU_NAME     spam
  --zone ZONE     where it is                    TPU_ZONE     us-west4-a
  --type TYPE     its kind and size              TPU_TYPE     v5litepod-8
  --runtime IMAGE its software                   TPU_RUNTIME  the one for TYPE
  --bucket gs://B keeps checkpoints and results  TPU_BUCKET   none
  --run RUN       name of the run                TPU_RUN      NAME
and
  --spot          a cheaper TPU that may be taken away at any time; needs --bucket
  --dry-run       print the commands instead of running them
  --help          this text

A TYPE with a number above 8 has several hosts, which write one checkpoint together:
it needs --bucket. Flags after -- are pretrain.py's; without any they are
  --preset 60m --data hf:allenai/c4:en --tokenizer t5-base
LIBTPU_INIT_ARGS, if set, replaces the compiler flags; if empty, there are none.

examples:
  launch.sh create install train
  launch.sh train -- --preset 350m --fsdp 4 --data hf:allenai/c4:en --tokenizer t5-base
  launch.sh --type v5litepod-32 --spot --bucket gs://mine create install train
after a preemption, with the same options and flags:
  launch.sh --type v5litepod-32 --spot --bucket gs://mine delete create install train
END
}

main() {
  parse "$@"
  check_steps
  check_names
  check_bucket
  exec 3>&1
  local step
  for step in $steps; do "${step}_step"; done
}

known_steps='create, wait, install, train, logs, stop, fetch or delete'

parse() {
  name=${TPU_NAME:-spam} zone=${TPU_ZONE:-us-west4-a} type=${TPU_TYPE:-v5litepod-8}
  runtime=${TPU_RUNTIME-} bucket=${TPU_BUCKET-} run_name=${TPU_RUN-}
  spot='' dry_run='' steps='' flags=''
  while [ $# -gt 0 ]; do
    case $1 in
      --name | --zone | --type | --runtime | --bucket | --run) set_option "$@" && shift ;;
      --spot) spot=yes ;;
      --dry-run) dry_run=yes ;;
      --help) usage && exit ;;
      --) shift && set_flags "$@" && break ;;
      create | wait | install | train | logs | stop | fetch | delete) steps="$steps $1" ;;
      -*) die "unknown option $1: see --help; flags of pretrain.py come after --" ;;
      *) die "unknown step $1: must be $known_steps" ;;
    esac
    shift
  done
  run_name=${run_name:-$name}
  bucket=${bucket%/}
}

set_option() {
  [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value"
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --type) type=$2 ;;
    --runtime) runtime=$2 ;;
    --bucket) bucket=$2 ;;
    --run) run_name=$2 ;;
  esac
}

# The flags of pretrain.py, as text for a shell.
set_flags() {
  local flag
  for flag; do
    case ${flag%%=*} in
      --output) die "--output is runs/RUN: choose RUN with --run" ;;
      --checkpoints) die "--checkpoints is in the bucket: choose that with --bucket" ;;
      --resume | --distributed) die "$flag is added where it is needed: leave it out" ;;
    esac
  done
  flags=$(quote "$@")
}

check_steps() {
  [ -n "$steps" ] || die "name a step: $known_steps"
  case "$steps " in
    *' train '*) ;;
    *) [ -z "$flags" ] || die "flags after -- are for the step train, which is not named" ;;
  esac
  [ -n "$dry_run" ] || command -v gcloud >/dev/null ||
    die "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
}

check_names() {
  local word
  for word in "$name" "$zone" "$type" "$run_name"; do
    case $word in
      [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*)
        die "names are made of letters, digits, dots, _ and -, which '$word' is not"
        ;;
    esac
  done
  case ${type##*-} in
    *[!0-9]*) die "--type must end in a size, as v5litepod-8 does, and not be '$type'" ;;
  esac
  [ -n "$runtime" ] || runtime=$(runtime_of "$type")
}

runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) die "--type must be a v6e, v5p, v5litepod, v4, v3 or v2, or name a --runtime" ;;
  esac
}

check_bucket() {
  case $bucket in
    gs://?*) ;;
    '')
      [ -z "$spot" ] || die "--spot needs --bucket: the disks go with the TPU"
      [ "${type##*-}" -le 8 ] || die "$type has several hosts and needs --bucket"
      ;;
    *) die "--bucket must be gs://NAME, not '$bucket'" ;;
  esac
}

create_step() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" \
    --zone="$zone" --accelerator-type="$type" --runtime-version="$runtime" \
    ${spot:+"--spot"}
  wait_step
}

wait_step() {
  local state
  while true; do
    state=$(run gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
      '--format=value(state.state)')
    [ -z "$dry_run" ] || return 0
    echo "$name: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND*) die "$name will not come: delete it and create it again" ;;
    esac
    sleep 30
  done
}

install_step() {
  local archive=${TMPDIR:-/tmp}/spam_optax-$name.tar.gz
  run tar -czf "$archive" -C "$root" --exclude=./.git --exclude=./runs '--exclude=./.venv*' .
  run gcloud compute tpus tpu-vm scp "$archive" "$name:spam_optax.tar.gz" \
    --zone="$zone" --worker=all
  on_hosts all "mkdir -p spam_optax && tar -xzf spam_optax.tar.gz -C spam_optax" \
    "&& $(on_host install)"
}

train_step() {
  local output=runs/$run_name folder=- answer
  set -- --distributed
  if [ -n "$bucket" ]; then
    folder=$bucket/$run_name/output
    set -- "$@" --checkpoints "$bucket/$run_name/checkpoints"
  fi
  # The first host decides for all whether the run is a new one.
  answer=$(on_hosts 0 "$(on_host restore "$output" "$folder")")
  case $answer in *--resume*) set -- "$@" --resume ;; esac
  [ -z "$dry_run" ] || echo "# With --resume after --distributed, if that printed --resume:"
  on_hosts all "$(quote env "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS-$(compiler_flags)}")" \
    "$(on_host start "$output" "$folder" "$@")" \
    "${flags:---preset 60m --data hf:allenai/c4:en --tokenizer t5-base}"
}

# What MaxText sets for collectives on these TPUs; README.md says what it does.
compiler_flags() {
  case $type in
    v5* | v6*)
      echo --xla_enable_async_all_gather=true \
        --xla_tpu_enable_async_collective_fusion=true \
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true \
        --xla_tpu_overlap_compute_collective_tc=true
      ;;
  esac
}

logs_step() {
  on_hosts 0 "$(on_host logs "runs/$run_name")"
}

stop_step() {
  on_hosts all "$(on_host stop "runs/$run_name")"
}

fetch_step() {
  run mkdir -p runs
  if [ -n "$bucket" ]; then
    run gcloud storage rsync "$bucket/$run_name/output" "runs/$run_name" --recursive
  else
    run gcloud compute tpus tpu-vm scp "$name:spam_optax/runs/$run_name" runs \
      --zone="$zone" --worker=0 --recurse
  fi
}

delete_step() {
  run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force
}

# on_hosts 0|all TEXT...: has the first host's shell, or each host's, run the text.
on_hosts() {
  local worker=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$worker" \
    --command="$*"
}

# on_host STEP WORD...: text that has a host do a step of host.sh.
on_host() {
  quote bash spam_optax/examples/tpu/host.sh "$@"
}

# Runs a command or, in a dry run, prints it to where launch.sh prints.
run() {
  if [ -n "$dry_run" ]; then quote "$@" >&3; else "$@"; fi
}

# Prints words so that a shell reads them back as they are.
quote() {
  local word option line='' escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        option=${word%%=*}=
        case $option in *[!A-Za-z0-9_=-]*) option='' ;; esac
        case $word in *=*) ;; *) option='' ;; esac
        word=${word#"$option"}
        word="$option'${word//\'/$escaped}'"
        ;;
    esac
    line="$line $word"
  done
  echo "${line# }"
}

die() {
  echo "launch.sh: error: $*" >&2
  exit 2
}

main "$@"
