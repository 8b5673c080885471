# Serving only: no torch, no compiler, not root. See README.md, "Installing".
#
#   docker build -t byol-server .                          CPU
#   docker build -t byol-server:gpu --build-arg EXTRA=gpu .  NVIDIA GPU (run with --gpus all)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY training training
COPY serving serving
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS install
# cpu or gpu: ONNX Runtime and FAISS come in one of two builds, and never both.
ARG EXTRA=cpu
COPY --from=build /wheels /wheels
RUN python -m venv /opt/byol \
    && /opt/byol/bin/python -m pip install --no-cache-dir "$(ls /wheels/*.whl)[${EXTRA},parquet]"

FROM python:${PYTHON}-slim
RUN useradd --uid 10001 --no-create-home byol && install --directory --owner byol /store /cache
COPY --from=install /opt/byol /opt/byol
ENV PATH=/opt/byol/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/cache \
    BYOL_SERVE_BUNDLE=/bundle \
    BYOL_SERVE_STORE=/store \
    BYOL_SERVE_HOST=0.0.0.0 \
    BYOL_SERVE_METRICS_PORT=9090
USER 10001
VOLUME /store
EXPOSE 50051 9090
HEALTHCHECK --start-period=30s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:9090/readyz', timeout=3)"]
# Not a shell: SIGTERM must reach the server, which then drains.
ENTRYPOINT ["byol"]
CMD ["serve"]
