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

# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" "$processes" "$(nproc)"

# --standalone picks a free port, so that several jobs can share the machine.
exec torchrun --standalone --nproc-per-node "$processes" -m contentv "$@"
