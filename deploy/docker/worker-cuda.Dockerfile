# syntax=docker/dockerfile:1
# A worker on an NVIDIA GPU. Build from the repository root: docker build -f deploy/docker/worker-cuda.Dockerfile .
FROM python:3.11-slim AS build
RUN pip install --no-cache-dir "uv==0.13.8"
WORKDIR /build
COPY pyproject.toml ./
COPY requirements requirements
# Without constraints.txt: that is the set tested on CPU, and CUDA vLLM pins some packages differently.
RUN python -m venv /venv --without-pip \
    && uv pip install --no-cache --compile-bytecode --python /venv/bin/python \
       -r pyproject.toml --extra worker-cuda --extra worker-ray --extra otel

FROM python:3.11-slim
# Triton compiles its launchers with the C compiler at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# vLLM and torch keep caches under HOME; /tmp may be the only place that can be written.
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin ascendra \
    && install --directory --owner=10001 /models
COPY --from=build /venv /venv
WORKDIR /app
COPY ascendra ascendra
COPY demo demo
COPY services/__init__.py services/__init__.py
COPY services/common services/common
COPY services/policy services/policy
COPY services/worker services/worker
COPY deploy/config/worker-lp.yaml deploy/config/worker-hp.yaml /etc/ascendra/
USER 10001
ENV ASCENDRA_ENGINE=cuda ASCENDRA_LISTEN=0.0.0.0:50061 ASCENDRA_METRICS_LISTEN=0.0.0.0:50090
EXPOSE 50061 50090
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s --start-interval=2s \
    CMD ["python", "-m", "services.common.health_probe", "127.0.0.1:50061"]
ENTRYPOINT ["python", "-m", "services.worker"]
CMD ["--config", "/etc/ascendra/worker-lp.yaml"]
