# BASE: any image with Python 3.10 or newer as `python3`, with venv; both stages use it, so that the copied environment finds its interpreter.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
# cpu, one of PyTorch's CUDA variants (cu126, cu128, cu130), or pypi for the build that PyPI serves.
ARG TORCH_VARIANT=cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/safeloop/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/safeloop \
    && grep '^torch==' constraints.txt > torch.txt \
    && if [ "$TORCH_VARIANT" = pypi ]; then pip install -r torch.txt; \
       else pip install -r torch.txt --index-url "https://download.pytorch.org/whl/$TORCH_VARIANT"; fi
COPY pyproject.toml README.md LICENSE ./
COPY safeloop safeloop
RUN pip install -c constraints.txt '.[examples]'

FROM ${BASE}
RUN groupadd --gid 10001 safeloop \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin safeloop \
    && install -d -o 10001 -g 10001 -m 0700 /runs
COPY --from=build /opt/safeloop /opt/safeloop
WORKDIR /app
# pyproject.toml holds the modules that a config may name.
COPY pyproject.toml ./
COPY configs configs
COPY examples examples
ENV PATH=/opt/safeloop/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SAFELOOP__RUN__DIR=/runs
USER 10001:10001
VOLUME /runs
HEALTHCHECK --interval=60s --timeout=10s CMD ["safeloop", "--version"]
ENTRYPOINT ["safeloop"]
CMD ["--help"]
