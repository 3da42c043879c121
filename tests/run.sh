#!/bin/sh
# Check format, lint and types, and test the built wheel on each installed version of Python.
# The newest version runs all tests with branch coverage. The oldest version skips tests that do not depend on Python.
# Versions in between run the core tests. FULL=1 runs all tests on each version.
set -eu
cd "$(dirname "$0")/.."

here="" installing=""
for version in $VERSIONS; do
    if python=$("python$version" -c 'import sys; print(sys.executable)' 2>/dev/null); then :
    elif [ "$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$version" ]; then python=$PYTHON
    else
        echo "== Python $version is not installed: skipped"
        continue
    fi
    venv=.venv-test-$version
    { { [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"; } &&
        "$venv/bin/python" -m pip install --quiet -r tests/requirements.txt; } &
    here="$here $version" installing="$installing $!"
done
[ -n "$here" ] || { echo "none of Python $VERSIONS is installed" >&2; exit 1; }
for job in $installing; do wait "$job"; done
rm -rf dist
newest=${here##* }
oldest=${here# }
oldest=${oldest%% *}
".venv-test-$newest/bin/python" -m build --wheel --no-isolation >/dev/null
for version in $here; do
    ".venv-test-$version/bin/python" -m pip install --quiet dist/*.whl
    # Without --force-reinstall, pip would keep a wheel of the same version.
    ".venv-test-$version/bin/python" -m pip install --quiet --force-reinstall --no-deps dist/*.whl
done
core=""
for name in serving shutdown tls reload clean; do core="$core tests/integration/test_$name.py"; done
core="$core tests/unit/test_session.py"

echo "== lint and types"
".venv-test-$newest/bin/ruff" format --check .
".venv-test-$newest/bin/ruff" check .
".venv-test-$newest/bin/mypy"

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
exit $status
