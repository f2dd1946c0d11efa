# Never built or run: where this was written there was no docker daemon. The steps are the Makefile's (.venv/installed).
#
#   docker build -t baichuan-sft .                                    with CUDA's libraries, which torch brings along
#   docker build -t baichuan-sft --build-arg EXTRAS=dev .             without GPU packages
#   docker run --gpus all --network host --ipc host --ulimit memlock=-1 -v /data:/data baichuan-sft \
#       baichuan-sft launch train --model_name_or_path /data/Baichuan2-7B-Base ...
#
# --ipc host: NCCL and data loaders need more than docker's 64 MiB of /dev/shm. --network host: the other hosts reach
# the ports of a run. Several hosts: start this container on each, then `launch --mode torchrun`, which needs no ssh.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04
ARG EXTRAS=dev,gpu
ARG TORCH=torch==2.13.0

# a compiler and headers for DeepSpeed's CPU Adam and Triton; make for the Makefile; ssh for `launch` over hosts
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git make openssh-client python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/baichuan-sft
# torch first and alone, as in the Makefile: what follows must not move it, and a change of code must not fetch it again
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir "${TORCH}"
COPY . .
RUN .venv/bin/pip install --no-cache-dir -c constraints.txt "${TORCH}" -e ".[${EXTRAS}]" && touch .venv/installed

ENV PATH=/opt/baichuan-sft/.venv/bin:$PATH
CMD ["baichuan-sft", "--help"]
