# CPU image: one process tree, non-root, all state on the volume /state. The GPU image starts from vLLM's own; see deploy/README.md.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make libnuma1 libgl1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/hotshoe
COPY . .
ENV HOTSHOE_CACHE=/opt/hotshoe-cache HOTSHOE_HOME=/state HF_HUB_OFFLINE=1 PATH=/opt/hotshoe/.venv/bin:$PATH
RUN make setup \
    && useradd --system --uid 10001 --home-dir /state hotshoe \
    && install --directory --owner hotshoe --mode 0700 /state

USER hotshoe
VOLUME /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
# A key is required as soon as the address is not loopback: set HOTSHOE_API_KEY, or the server refuses to start and says so.
ENTRYPOINT ["hotshoe"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
