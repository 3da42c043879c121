# Any image with Python 3.11 or later, its venv module and a shell.
ARG BASE_IMAGE=docker.io/library/python:3.13-slim


FROM ${BASE_IMAGE} AS build

# What the label says; the build fails where the package says otherwise.
ARG VERSION=0.1.0

WORKDIR /source
COPY . .
RUN set -eu; \
    python3 -m venv /build; \
    /build/bin/pip --no-cache-dir wheel --quiet --no-deps --wheel-dir /wheel .; \
    python3 -m venv --without-pip /opt/echod; \
    # Paths in scripts stay right, as the environment does not move.
    /build/bin/pip --python /opt/echod/bin/python --no-cache-dir install --quiet --no-compile \
        "echod[admin] @ file://$(echo /wheel/echod-*.whl)"; \
    # The root file system is read-only later. Time stamps do not say whether a file is current, so that copying is safe.
    /opt/echod/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/echod/lib; \
    test "$(/opt/echod/bin/echod --version)" = "echod $VERSION"


FROM ${BASE_IMAGE} AS trimmed

# A compiler would be too many packages to take out. pip and its kin go; the standard library is compiled, which some
# base images leave to a first run that may write.
RUN set -eu; \
    for tool in cc gcc clang; do \
        if command -v "$tool"; then echo "BASE_IMAGE has a compiler: take one without, such as python:3.13-slim"; exit 1; fi; \
    done; \
    library=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))'); \
    rm -rf "$library/ensurepip" "$library/idlelib" "$library/lib2to3" "$library/test" "$library/turtledemo"; \
    for name in pip setuptools wheel pkg_resources _distutils_hack distutils-precedence.pth; do \
        find / -xdev \( -path '*/site-packages/*' -o -path '*/dist-packages/*' \) \
            \( -name "$name" -o -name "$name-*.dist-info" -o -name "$name-*.egg-info" \) -prune -exec rm -rf {} +; \
    done; \
    find / -xdev -type f \( -name 'pip' -o -name 'pip3*' -o -name 'wheel' -o -name 'easy_install*' \) -path '*/bin/*' -delete; \
    rm -rf /usr/share/python-wheels /root/.cache /var/cache/* /var/lib/apt/lists/* /var/log/* /tmp/*; \
    # Nothing in it needs another user's rights.
    find / -xdev -type f -perm /6000 -exec chmod ug-s {} +; \
    python3 -m compileall -q -j 0 "$library"

COPY --from=build /opt/echod /opt/echod
COPY packaging/docker/echod.toml /etc/echod/echod.toml


# From nothing, so that what was removed is in no layer either.
FROM scratch

COPY --from=trimmed / /

ARG BASE_IMAGE
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="echod" \
      org.opencontainers.image.description="A TCP echo daemon that loses nothing and says what it did" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.authors="The echod authors" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

ENV PATH=/opt/echod/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    ECHOD_CONFIG=/etc/echod/echod.toml

# Nobody; as a number, which Kubernetes can tell from root.
USER 65534:65534
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM

# The address follows ECHOD_LISTEN; where a file or an argument sets another, --health-cmd says it.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s --retries=3 \
    CMD ["/bin/sh", "-c", "set -f; IFS=', '; set -- ${ECHOD_LISTEN:-:8000}; exec echod probe --timeout 3 \"$1\""]

ENTRYPOINT ["/opt/echod/bin/echod"]
