#!/usr/bin/env bash
# Trains on this machine: ./run_train.sh [--section.key value ...]
#
#   NGPU         ranks to start; default: all visible GPUs, else 2 ranks on the CPU
#   CONFIG_FILE  TOML file; default: train_configs/debug.toml
#   LOG_RANK     ranks whose log is shown, comma-separated; default: 0
#   PYTHON       interpreter to use, or to make .venv with; default: python3
#
# Relative paths are taken from this repository, whatever the current folder; CONFIG_FILE first from the current one.
# SIGTERM, SIGUSR1 and Ctrl-C make all ranks finish their step, save and leave; a second Ctrl-C kills them.
# Exit code: 0 finished; 75 stopped before the end, start again to go on; else failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
. "$root/scripts/environment.sh"

config_file=${CONFIG_FILE:-train_configs/debug.toml}
if [ "${config_file#/}" = "$config_file" ] && [ -e "$config_file" ]; then config_file=$PWD/$config_file; fi
cd "$root"

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        find_python
        sed -n '2,/^set /s/^# \{0,1\}//p' "$root/run_train.sh"
        exec "$base" -m titanlite.train --help
    fi
done

count_gpus() {
    local present=0
    if command -v nvidia-smi >/dev/null 2>&1; then present=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true); fi
    if [ "$present" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # CUDA stops at the first entry that is none
        present=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" |
            awk -F, '{ for (i = 1; i <= NF && $i ~ /^ *([0-9]+|GPU-.*|MIG-.*) *$/; i++) n++ } END { print n + 0 }')
    fi
    echo "$present"
}

gpus=$(count_gpus)
ngpu=${NGPU:-$gpus}
if [ "$ngpu" = 0 ]; then ngpu=2; fi
case $ngpu in *[!0-9]* | 0*) fail "NGPU = '$ngpu': must be the number of ranks to start" ;; esac
if [ "$gpus" -gt 0 ] && [ "$ngpu" -gt "$gpus" ]; then fail "NGPU = $ngpu: only $gpus GPUs are visible"; fi

use_environment torch
arguments=(--job.config_file "$config_file" "$@")
# Wrong settings are told here, once, and not by every rank.
dump_folder=$(WORLD_SIZE=$ngpu "$python" -m titanlite.config --print job.dump_folder "${arguments[@]}") || exit 1
status=$dump_folder/status.json
before=$(status_mark "$status")

export LOG_RANK=${LOG_RANK:-0}
if [ -z "${OMP_NUM_THREADS:-}" ]; then # else torchrun gives each rank one thread
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > ngpu ? cores / ngpu : 1))
fi
if [ "$gpus" -eq 0 ]; then export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}; fi # ranks share the cores: no spinning

# A signal goes to the ranks and not to torchrun, which would die of SIGUSR1, and kill them 30 s after a SIGTERM. Before
# there are ranks, torchrun has it and ends.
asked=no
signal_ranks() {
    local ranks
    asked=yes signalled=yes
    ranks=$(ps -A -o pid= -o ppid= 2>/dev/null | awk -v launcher="$launcher" '$2 == launcher { print $1 }')
    # shellcheck disable=SC2086 # one word per rank
    kill "-$1" ${ranks:-"$launcher"} 2>/dev/null || true
}
interrupt() {
    if [ "$asked" = no ]; then
        printf '\n%s: stopping after this step and a checkpoint; Ctrl-C again to kill\n' "${0##*/}" >&2
        signal_ranks TERM
    else
        signal_ranks KILL
    fi
}
trap 'signal_ranks TERM' TERM USR1 HUP
trap interrupt INT

set -m # a process group of its own, or a Ctrl-C in the terminal would reach torchrun too
(
    trap '' USR1
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$ngpu" -m titanlite.train "${arguments[@]}"
) &
launcher=$!
set +m

code=
while :; do # wait returns early, with a code above 128, when a signal comes
    signalled=no
    if wait "$launcher"; then result=0; else result=$?; fi
    if [ "$result" != 127 ]; then code=$result; fi # 127: it had ended, and its code is known
    if [ "$signalled" = no ] || [ "$result" -le 127 ]; then break; fi
done
exit "$(run_exit_code "$status" "$before" "$code" "$asked")"
