# shellcheck shell=bash
# The environment of every launcher:   . launch/environment.sh PROCESSES CORES
#
# PROCESSES of the job share a machine of CORES cores. What is set already is kept. Listed in docs/clusters.md.

# Unset, torchrun gives a process one thread, which starves decoding and the optimizer on the host; torch alone takes every
# core for each process, and they wait for each other. So: an equal share.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($2 > $1 ? $2 / $1 : 1))}"
# Growing segments instead of blocks of fixed sizes: buckets of different shapes would fragment the device's memory.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# At a time-out each rank writes its last collectives to /tmp/nccl_trace_rank_*: they show which rank was missing.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
# Seconds in which processes that were told to stop may save before torchrun kills them; its own default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# A line of a log appears when it is written, not when a buffer is full.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
