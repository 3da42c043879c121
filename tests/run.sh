#!/bin/sh
# Check format, lint and types, and test the built wheel on each installed version of Python.
# The newest version runs all tests with branch coverage. The oldest version skips tests that do not depend on Python.
# Versions in between run the core tests. FULL=1 runs all tests on each version.
set -eu
cd "$(dirname "$0")/.."

# Print the path of the interpreter of a version.
find_python() {
    "python$1" -c 'import sys; print(sys.executable)' 2>/dev/null ||
        "$PYTHON" -c 'import sys; sys.exit(sys.argv[1] != "%d.%d" % sys.version_info[:2] or print(sys.executable))' "$1"
}

# Install the tools in the environment of a version. Only the newest version builds, and checks types and documents.
install_tools() {
    [ -x ".venv-test-$1/bin/python" ] || "$(find_python "$1")" -m venv ".venv-test-$1"
    requirements=tests/requirements-core.txt
    if [ "$1" = "$newest" ] || [ -n "${FULL:-}" ]; then requirements=tests/requirements.txt; fi
    ".venv-test-$1/bin/python" -m pip install --quiet -r "$requirements"
}

install_wheel() {
    ".venv-test-$1/bin/python" -m pip install --quiet dist/*.whl
    # Without --force-reinstall, pip would keep a wheel of the same version.
    ".venv-test-$1/bin/python" -m pip install --quiet --force-reinstall --no-deps dist/*.whl
}

# Call a function for all versions at the same time.
for_each() {
    jobs=""
    for version in $here; do
        "$1" "$version" &
        jobs="$jobs $!"
    done
    for job in $jobs; do wait "$job"; done
}

here=""
for version in $VERSIONS; do
    if find_python "$version" >/dev/null; then here="$here $version"; else echo "== Python $version is not installed: skipped"; fi
done
[ -n "$here" ] || { echo "none of Python $VERSIONS is installed" >&2; exit 1; }
newest=${here##* }
oldest=${here# }
oldest=${oldest%% *}
for_each install_tools
rm -rf dist
".venv-test-$newest/bin/python" -m build --wheel --no-isolation >/dev/null
for_each install_wheel
core=""
for name in serving shutdown tls reload clean; do core="$core tests/integration/test_$name.py"; done
core="$core tests/unit/test_session.py tests/simulation"

echo "== lint"
".venv-test-$newest/bin/ruff" format --check .
".venv-test-$newest/bin/ruff" check .
# mypy uses a single processor, and tests wait often.
".venv-test-$newest/bin/mypy" >dist/mypy 2>&1 &
types=$!

status=0
for version in $here; do
    bin=.venv-test-$version/bin
    # Python 3.11 stops tracing a coroutine once an exception is thrown into it, so its coverage would be wrong.
    if [ "$version" = "$newest" ] && [ "$version" != 3.11 ]; then
        echo "== tests on Python $version, with branch coverage"
        "$bin/coverage" erase
        "$bin/coverage" run -m pytest -n 4 --dist worksteal || status=1
        "$bin/python" tests/support/drop_damaged_coverage.py
        "$bin/coverage" combine --quiet || status=1
        "$bin/coverage" report || status=1
    else
        echo "== tests on Python $version"
        selected="" files=""
        if [ "$version" != "$newest" ] && [ -z "${FULL:-}" ]; then
            selected="not once and not container and not chromium"
            [ "$version" = "$oldest" ] || files=$core
        fi
        # shellcheck disable=SC2086
        "$bin/python" -m pytest -n 4 --dist worksteal -m "$selected" $files || status=1
    fi
done
echo "== types"
wait "$types" || status=1
cat dist/mypy
exit $status
