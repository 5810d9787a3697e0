# syntax=docker/dockerfile:1
# The gateway: no torch, no vLLM. Build from the repository root: docker build -f deploy/docker/gateway.Dockerfile .
FROM python:3.11-slim AS build
RUN pip install --no-cache-dir "uv==0.13.8"
WORKDIR /build
COPY pyproject.toml ./
COPY requirements requirements
# Only what the project depends on: the sources come later, so that editing them keeps this layer.
RUN python -m venv /venv --without-pip \
    && uv pip install --no-cache --compile-bytecode --python /venv/bin/python \
       --constraints requirements/constraints.txt -r pyproject.toml --extra gateway --extra otel

FROM python:3.11-slim
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin ascendra
COPY --from=build /venv /venv
WORKDIR /app
COPY ascendra ascendra
COPY services/__init__.py services/__init__.py
COPY services/common services/common
COPY services/gateway services/gateway
COPY deploy/config/gateway.yaml /etc/ascendra/gateway.yaml
USER 10001
ENV ASCENDRA_LISTEN=0.0.0.0:8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s \
    CMD ["python", "-m", "services.common.health_probe", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["python", "-m", "services.gateway"]
CMD ["--config", "/etc/ascendra/gateway.yaml"]
