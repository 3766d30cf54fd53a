# The server, on a CPU:       docker build -t lazyahead .
# and on NVIDIA GPUs:         docker build -t lazyahead:cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#                               --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=ubuntu:24.04
FROM ${BASE}

# gcc compiles the loops for bfloat16 on the CPU, once per cache folder
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/lazyahead \
    && useradd --create-home --uid 10001 lazyahead

ENV PATH=/opt/lazyahead/bin:$PATH \
    HF_HOME=/models/hub \
    LAZYAHEAD_CACHE=/models/lazyahead \
    OMP_WAIT_POLICY=passive

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt ".[serve]" \
    && mkdir -p /models && chown 10001 /models

USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["lazyahead", "serve", "--host", "0.0.0.0", "--port", "8000"]
