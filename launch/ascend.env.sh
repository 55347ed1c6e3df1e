# shellcheck shell=bash
# The environment of a run on Ascend NPUs. Source it before a launcher, on every node:
#
#   . launch/ascend.env.sh && launch/local.sh 8 train device=npu ...
#
# Values already set are kept. Written from CANN's and torch_npu's documentation; not yet tried on an Ascend machine.

# CANN's own variables: libraries, operators, the driver's tools. Its script reads variables that may be unset.
ASCEND_TOOLKIT_HOME="${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit/latest}"
for script in "$ASCEND_TOOLKIT_HOME/../set_env.sh" "$ASCEND_TOOLKIT_HOME/set_env.sh"; do
    if [ -r "$script" ]; then
        # shellcheck disable=SC1090
        . "$script"
        break
    fi
done
if ! command -v atc >/dev/null 2>&1; then
    echo "ascend.env.sh: no CANN under $ASCEND_TOOLKIT_HOME; install it or set ASCEND_TOOLKIT_HOME" >&2
fi

# Seconds to wait for all ranks to connect. The default of 120 is too short when hundreds read a checkpoint first.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"
# Seconds a collective may take before it is an error that names the rank. Longer than any checkpoint or evaluation.
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-1800}"
# Without a whitelist file of peer addresses HCCL refuses to connect unless this is 1.
export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}"
# Growing segments: buckets of different shapes would otherwise fragment the device's memory.
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
# Operators are queued by a second thread; 2 also takes their preparation off the main one.
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-2}"
# CANN logs errors only (0 debug, 1 info, 2 warning, 3 error): its logs otherwise fill the home directory.
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
