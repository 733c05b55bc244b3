#!/usr/bin/env bash
# Resolve requirements.in for Python 3.10 to 3.12 into requirements.lock, with uv from a throw-away environment.
# torch's CUDA libraries stay out: torch pins them exactly itself, and the CPU build has none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
python3 -m venv "$tool" && "$tool/bin/pip" install --quiet uv
resolve() { "$tool/bin/uv" pip compile --universal --python-version 3.10 --no-header --no-annotate "$@" requirements.in; }
skip=$(resolve 2>/dev/null | grep -oE '^(nvidia|cuda|triton)[a-z0-9-]*' | sort -u | sed 's/^/--no-emit-package /')
# shellcheck disable=SC2086
resolve $skip --quiet -o requirements.lock
