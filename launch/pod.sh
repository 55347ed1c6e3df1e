#!/usr/bin/env bash
# One pod of a PyTorchJob (launch/kubernetes.yaml):   launch/pod.sh COMMAND key=value ...
#
# The operator's PET_* variables say how many machines and processes there are, which machine this is, and where the first
# one is. SIGTERM reaches every process; they save.
set -euo pipefail

if [ "$#" -lt 1 ] || [ -z "${PET_NPROC_PER_NODE:-}" ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh" "$PET_NPROC_PER_NODE" "$(nproc)"

# Machines in the order of their numbers (static), not in that of their arrival; no restarts within a pod, since the
# other pods would not take part: the operator starts them all again.
exec torchrun --rdzv-backend static --max-restarts 0 -m contentv "$@"
