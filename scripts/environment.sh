# Sourced by the scripts beside it: goes to the repository's root and makes .venv what requirements.lock says.
# What is missing of Debian's packages is installed when we are root; otherwise the command to run is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '==> %s\n' "$*" >&2; }

need_packages() { # PACKAGE...
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "missing: $*. Install with:  sudo apt-get update && sudo apt-get install -y --no-install-recommends $*"
        exit 1
    fi
    say "installing Debian packages: $*"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

is_suitable() { # PYTHON: new enough, and of a version that requirements.lock has hashes for
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 13)))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 /usr/bin/python3.11 python3.13 python3; do
        if is_suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

make_venv() { # PYTHON STAMP
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        need_packages "python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    say "making .venv (once, and again when requirements.lock changes; takes about a minute)"
    rm -rf .venv
    "$1" -m venv .venv
    local pip=(.venv/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input install)
    # setuptools first: it builds the packages that come as source only, at the version and hash that are locked.
    "${pip[@]}" --require-hashes -r <(sed -n '/^setuptools==/,/[^\\]$/p' requirements.lock)
    say "installing $(grep -c '==' requirements.lock) packages"
    "${pip[@]}" --require-hashes --no-build-isolation --use-pep517 -r requirements.lock
    "${pip[@]}" --no-deps --no-build-isolation --editable .
    printf '%s\n' "$2" >.venv/stamp
}

ensure_venv() {
    local python stamp
    python=$(find_python)
    if [ -z "$python" ]; then
        need_packages python3.11 python3.11-venv
        python=$(command -v python3.11)
    fi
    # The place is part of the stamp: a virtual environment does not survive being moved.
    stamp=$({ "$python" -V; pwd; cat requirements.lock; sed -n "/^\[project/,/^\[tool\.ruff/p" pyproject.toml; } | sha256sum)
    exec 9<requirements.lock
    flock 9 # two scripts started together make one environment
    if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
        make_venv "$python" "$stamp"
    fi
    exec 9<&-
    if ! command -v openssl >/dev/null; then
        need_packages openssl
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

ensure_venv
