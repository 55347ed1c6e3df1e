# syntax=docker/dockerfile:1
# Images of this checkout, one target per kind of machine (launch/docker.sh builds and runs them):
#
#   docker build --target cpu  -t contentv:cpu  .
#   docker build --target cuda -t contentv:cuda .     # builds apex and flash-attn from source: an hour, much memory
#   docker build --target npu  -t contentv:npu  .
#
# Arguments:
#   CPU_BASE, CUDA_BASE, NPU_BASE      the images built upon
#   FLASH_ATTN_VERSION, APEX_COMMIT    what the cuda target builds ("" leaves one out: contentv runs without either)
#   CUDA_ARCHITECTURES                 compute capabilities they are built for
#   MAX_JOBS                           compiler processes; each takes up to 8 GB
#   TORCH_NPU_VERSION                  must match both CANN and torch, see torch_npu's compatibility table
#
# CUDA_BASE needs torch >= 2.10 and its own torch is kept: it is built for its CUDA. NPU_BASE needs CANN.
ARG CPU_BASE=python:3.11-slim-bookworm
ARG CUDA_BASE=nvcr.io/nvidia/pytorch:26.02-py3
ARG NPU_BASE=quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11

# What an installation needs of the checkout, and nothing else: editing tests or docs rebuilds no image.
FROM scratch AS source
COPY setup.py pyproject.toml constraints.txt README.md LICENSE NOTICE /src/
COPY contentv /src/contentv
COPY conf /src/conf
COPY kernels /src/kernels
COPY launch /src/launch

FROM ${CPU_BASE} AS cpu
# g++ and ninja: DeepSpeed builds its CPU optimizer and torch.compile its kernels when first used.
RUN apt-get update && apt-get install -y --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*
COPY --from=source /src /opt/contentv
WORKDIR /opt/contentv
RUN pip install --no-cache-dir --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir --constraint constraints.txt ".[tensorboard,wandb]"
ENV DS_ACCELERATOR=cpu PATH=/opt/contentv/launch:$PATH
CMD ["contentv", "doctor"]

# apex (the registry's package of that name is another project) and flash-attn, which has no wheels for new torch builds.
FROM ${CUDA_BASE} AS cuda-wheels
ARG FLASH_ATTN_VERSION=2.8.3
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG CUDA_ARCHITECTURES="8.0;9.0"
ARG MAX_JOBS=4
ENV TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES} MAX_JOBS=${MAX_JOBS}
RUN mkdir /wheels
RUN if [ -n "$FLASH_ATTN_VERSION" ]; then \
        FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS="$(echo "$CUDA_ARCHITECTURES" | tr -d .)" \
        pip wheel --no-cache-dir --no-deps --no-build-isolation --no-binary flash-attn --wheel-dir /wheels \
            "flash-attn==$FLASH_ATTN_VERSION"; \
    fi
RUN if [ -n "$APEX_COMMIT" ]; then \
        git clone --filter=blob:none https://github.com/NVIDIA/apex /tmp/apex \
        && git -C /tmp/apex checkout "$APEX_COMMIT" \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels /tmp/apex \
        && rm -rf /tmp/apex; \
    fi

FROM ${CUDA_BASE} AS cuda
COPY --from=cuda-wheels /wheels /tmp/wheels
COPY --from=source /src /opt/contentv
WORKDIR /opt/contentv
# The base image's torch takes the place of the pinned one.
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && python -c "import torch; print('torch==' + torch.__version__)" >> /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[gpu,tensorboard,wandb]" \
    && find /tmp/wheels -name '*.whl' -exec pip install --no-cache-dir --no-deps --force-reinstall {} + \
    && rm -rf /tmp/wheels
ENV PATH=/opt/contentv/launch:$PATH
CMD ["contentv", "doctor"]

FROM ${NPU_BASE} AS npu
ARG TORCH_NPU_VERSION=2.10.0.post4
RUN apt-get update && apt-get install -y --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*
COPY --from=source /src /opt/contentv
WORKDIR /opt/contentv
# torch_npu 2.10.0.post4 is built for torch 2.10.0, whose CPU build is the one it extends. It is installed last: once it
# is there, `import torch` needs CANN's libraries, which are on the path only after launch/ascend.env.sh.
RUN version="$(echo "$TORCH_NPU_VERSION" | cut -d. -f1-3)" \
    && grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && echo "torch==$version" >> /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[tensorboard,wandb]" \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "torch_npu==$TORCH_NPU_VERSION" pyyaml
ENV PATH=/opt/contentv/launch:$PATH
# Whatever runs in the container finds CANN.
ENTRYPOINT ["/bin/bash", "-c", ". /opt/contentv/launch/ascend.env.sh && exec \"$0\" \"$@\""]
CMD ["contentv", "doctor"]
