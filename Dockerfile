# Two images: `docker build --target cpu .` and `docker build --target gpu .`; deploy/README.md runs them.
# In both: what is installed comes before the code, a user without rights, the code read-only, everything that is written
# on the volume /state: the state itself in /state/hotshoe, and in /state/cache what can be made again.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0

# vLLM with its torch and CUDA is the image's own; gpu.lock holds only packages that it does not bring.
FROM ${VLLM_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/hotshoe
ENV HOME=/state HOTSHOE_HOME=/state/hotshoe XDG_CACHE_HOME=/state/cache TRITON_CACHE_DIR=/state/cache/triton \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY requirements/gpu.lock requirements/
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-deps --require-hashes -r requirements/gpu.lock
COPY . .
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python3 requirements/satisfied.py requirements/cpu.in \
    && useradd --uid 10001 --home-dir /state --no-create-home --shell /usr/sbin/nologin hotshoe \
    && install --directory --owner hotshoe --mode 0700 /state
USER 10001
VOLUME /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["hotshoe"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

# The compiled LoRA kernel, for every kind of processor; the image itself has no compiler.
FROM python:3.11-slim-bookworm AS kernel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hotshoe
COPY adapters adapters
COPY server server
RUN HOTSHOE_CACHE=/made python -m server.vllm_plugin.kernel_build --all

FROM python:3.11-slim-bookworm AS cpu
# vLLM's compiled part wants libnuma. Debian keeps one version of it in a release: a pinned one would be gone with the next
# security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hotshoe
ENV HOME=/state HOTSHOE_HOME=/state/hotshoe XDG_CACHE_HOME=/state/cache HOTSHOE_CACHE=/opt/hotshoe-cache \
    PATH=/opt/hotshoe/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY requirements requirements
RUN PIP_NO_CACHE_DIR=1 python3.11 requirements/install.py --packages
# The embedded base, 540 MB, is made again only when adapters/ changes.
COPY adapters adapters
RUN PIP_NO_CACHE_DIR=1 python -c "from adapters.embedded import default_base; default_base()"
COPY --from=kernel /made/kernels /opt/hotshoe-cache/kernels
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --uid 10001 --home-dir /state --no-create-home --shell /usr/sbin/nologin hotshoe \
    && install --directory --owner hotshoe --mode 0700 /state
USER 10001
VOLUME /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
# A server that other machines reach wants a key: HOTSHOE_API_KEY, or one made before the start with `hotshoe keys create`.
ENTRYPOINT ["hotshoe"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
