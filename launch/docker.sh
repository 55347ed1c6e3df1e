#!/usr/bin/env bash
# Images of this checkout:   launch/docker.sh build cpu|cuda|npu [docker build options]
#                            launch/docker.sh run cpu|cuda|npu COMMAND [arguments]
#
#   launch/docker.sh build cuda --build-arg MAX_JOBS=8
#   launch/docker.sh run cuda launch/local.sh 8 train model=contentv_8b data.path=data/clips out=outputs/run
#
# `run` mounts the current directory at /work and writes as the calling user. IMAGE names the image (default: contentv).
set -euo pipefail

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ "$#" -ge 2 ] || usage
verb=$1
target=$2
shift 2
image="${IMAGE:-contentv}:$target"

devices=()
case "$target" in
    cpu) ;;
    # NCCL and data loading use shared memory and pinned pages beyond Docker's defaults.
    cuda) devices=(--gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864) ;;
    npu)
        devices=(--ipc host --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc
            --volume /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro
            --volume /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro)
        for device in /dev/davinci[0-9]*; do
            devices+=(--device "$device")
        done
        ;;
    *) usage ;;
esac

case "$verb" in
    build) exec docker build --target "$target" --tag "$image" "$@" "$(dirname "$0")/.." ;;
    run)
        [ "$#" -ge 1 ] || usage
        exec docker run --rm --init --network host "${devices[@]}" --user "$(id -u):$(id -g)" --env HOME=/tmp \
            --volume "$PWD:/work" --workdir /work "$image" "$@"
        ;;
    *) usage ;;
esac
