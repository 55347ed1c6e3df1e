#!/usr/bin/env bash
# One machine, several processes:   launch/local.sh PROCESSES COMMAND key=value ...
#
#   launch/local.sh 8 train model=contentv_8b stage=lowres_video data.path=/data/clips out=outputs/lowres
#
# PROCESSES is one per accelerator. SIGINT and SIGTERM reach all of them; exit code 0 is success.
set -euo pipefail

if [ "$#" -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
processes=$1
shift

# torchrun sets one thread per process when this is unset, which starves data decoding and the CPU-offloaded optimizer;
# torch alone would start one per core in every process, and they would wait for each other. So: an equal share.
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

# --standalone picks a free port, so that several jobs can share the machine.
exec torchrun --standalone --nproc-per-node "$processes" -m contentv "$@"
