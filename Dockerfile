# The trainer with vLLM on NVIDIA GPUs, driver 580 or newer:
#   docker build -t care .
#   docker run --gpus all --shm-size 16g -v "$PWD/runs:/work/runs" care train --config configs/care.yaml model.path=...
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# DeepSpeed and the CPU loss compile on first use: a compiler and Python's headers stay in the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git ninja-build python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/care/bin:$PATH PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3013
RUN python3.12 -m venv /opt/care \
    && pip install "torch>=2.14,<2.15" "torchvision>=0.29,<0.30" setuptools wheel ninja hatchling editables py-cpuinfo psutil

WORKDIR /work
COPY pyproject.toml README.md LICENSE ./
COPY care_kernels care_kernels
COPY care_train care_train
# torch is there already, and DeepSpeed's build must see it: no isolation.
# hadolint ignore=DL3013
RUN pip install --no-build-isolation ".[train,vllm]"
COPY configs configs

RUN useradd --create-home --uid 1000 care && mkdir -p runs && chown care runs
USER 1000
ENTRYPOINT ["care-train"]
CMD ["--help"]
