# Any image with Python 3.11 or later, its venv module and a shell.
ARG BASE_IMAGE=docker.io/library/python:3.13-slim


FROM ${BASE_IMAGE} AS build

# The version for the label. The build fails if the package has a different one.
ARG VERSION=0.1.0

WORKDIR /source
COPY . .
RUN set -eu; \
    python3 -m venv /build; \
    /build/bin/pip --no-cache-dir wheel --quiet --no-deps --wheel-dir /wheel .; \
    python3 -m venv --without-pip /opt/echod; \
    # Scripts contain absolute paths, so the environment is created at its final place.
    /build/bin/pip --python /opt/echod/bin/python --no-cache-dir install --quiet --no-compile \
        "echod-server[admin] @ file://$(echo /wheel/echod_server-*.whl)"; \
    # Compile now, as the root file system will be read-only. Hash-based files stay valid when copying changes time stamps.
    /opt/echod/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/echod/lib; \
    test "$(/opt/echod/bin/echod --version)" = "echod $VERSION"


FROM ${BASE_IMAGE} AS trimmed

# Remove pip and related packages. A base image with a compiler is rejected, as removing one is not practicable.
# Compile the standard library too, because some base images do that only at the first run.
RUN set -eu; \
    for tool in cc gcc clang; do \
        if command -v "$tool"; then echo "BASE_IMAGE has a compiler: use an image without one, such as python:3.13-slim"; exit 1; fi; \
    done; \
    library=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))'); \
    rm -rf "$library/ensurepip" "$library/idlelib" "$library/lib2to3" "$library/test" "$library/turtledemo"; \
    for name in pip setuptools wheel pkg_resources _distutils_hack distutils-precedence.pth; do \
        find / -xdev \( -path '*/site-packages/*' -o -path '*/dist-packages/*' \) \
            \( -name "$name" -o -name "$name-*.dist-info" -o -name "$name-*.egg-info" \) -prune -exec rm -rf {} +; \
    done; \
    find / -xdev -type f \( -name 'pip' -o -name 'pip3*' -o -name 'wheel' -o -name 'easy_install*' \) -path '*/bin/*' -delete; \
    rm -rf /usr/share/python-wheels /root/.cache /var/cache/* /var/lib/apt/lists/* /var/log/* /tmp/*; \
    # Nothing in the image needs setuid or setgid.
    find / -xdev -type f -perm /6000 -exec chmod ug-s {} +; \
    python3 -m compileall -q -j 0 "$library"

COPY --from=build /opt/echod /opt/echod
COPY packaging/docker/echod.toml /etc/echod/echod.toml


# Start from scratch, so that no layer contains the removed files.
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

# The user nobody, as a number, because Kubernetes checks that it is not root.
USER 65534:65534
WORKDIR /
EXPOSE 8000/tcp 8000/udp
STOPSIGNAL SIGTERM

# The address comes from ECHOD_LISTEN. If a file or an argument sets another, override this with --health-cmd.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s --retries=3 \
    CMD ["/bin/sh", "-c", "set -f; IFS=', '; set -- ${ECHOD_LISTEN:-:8000}; exec echod probe --timeout 3 \"$1\""]

ENTRYPOINT ["/opt/echod/bin/echod"]
