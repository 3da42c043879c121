#!/bin/sh
# Lint, types, and the tests against the built and installed wheel, on each version of Python that is here.
set -eu
cd "$(dirname "$0")/.."

status=0
first=""
for version in $VERSIONS; do
    if python=$("python$version" -c 'import sys; print(sys.executable)' 2>/dev/null); then :
    elif [ "$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$version" ]; then python=$PYTHON
    else
        echo "== Python $version is not installed: left out"
        continue
    fi
    venv=.venv-test-$version
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet -r tests/requirements.txt
    if [ -z "$first" ]; then
        first=$version
        rm -rf dist
        "$venv/bin/python" -m build --wheel --no-isolation >/dev/null
    fi
    "$venv/bin/python" -m pip install --quiet dist/*.whl
    # The version stays the same from change to change, so pip would keep the old one.
    "$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps dist/*.whl

    if [ "$first" = "$version" ]; then
        echo "== lint and types"
        "$venv/bin/ruff" format --check .
        "$venv/bin/ruff" check .
        "$venv/bin/mypy"
        echo "== tests on Python $version, with branch coverage"
        "$venv/bin/coverage" erase
        "$venv/bin/coverage" run -m pytest -n 2 || status=1
        "$venv/bin/coverage" combine --quiet
        "$venv/bin/coverage" report || status=1
    else
        echo "== tests on Python $version"
        "$venv/bin/python" -m pytest -n 2 || status=1
    fi
done
[ -n "$first" ] || { echo "none of Python $VERSIONS is installed" >&2; exit 1; }
exit $status
