#!/usr/bin/env bash
# Builds the wheel, installs it in a new environment, and runs a selection of tests against it, away from the sources.
# The environment borrows torch and the other packages from that of $PYTHON. R2F_BUILD chooses what is built.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
export PATH="$(dirname "$python"):$PATH" # ninja
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf build/lib*
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --quiet --python "$work/venv/bin/python" install --no-deps --no-index "$work"/r2f_ext-*.whl
site=$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$python" -c 'import site; print(site.getsitepackages()[0])' >"$site/borrowed.pth" # after the wheel in sys.path

cp -r python_tests pyproject.toml "$work"
cd "$work"
"$work/venv/bin/python" -c 'import r2f_ext, sys; assert r2f_ext.__file__.startswith(sys.prefix), r2f_ext.__file__'
"$work/venv/bin/r2f" env
tests=(test_installation.py test_front.py test_env.py test_files.py ops models/test_embedded.py)
"$work/venv/bin/python" -m pytest -q "${tests[@]/#/python_tests/}"
