#!/usr/bin/env bash
# Makes .venv with Python 3.12 and everything the project needs; does nothing when it is up to date.
# Usage: bash scripts/setup.sh
#   SETUP_TARGET=cpu|gpu   which vLLM to install (default: gpu where an NVIDIA device is visible)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.setup-stamp
unfinished=$venv/.setup-unfinished

say() { printf '[setup] %s\n' "$*"; }
fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 2
}

choose_target() {
    if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then echo gpu; else echo cpu; fi
}

is_python_312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' </dev/null >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.12 python3 python "${HOME:-}"/.pyenv/versions/3.12*/bin/python; do
        if is_python_312 "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    uv python find --no-python-downloads 3.12 2>/dev/null
}

make_venv() {
    local python
    python=$(find_python) || fail "no Python 3.12 found; install one (for example 'pyenv install 3.12'," \
        "'uv python install 3.12' or 'apt install python3.12 python3.12-venv') and run this again"
    say "making $venv with $("$python" --version)"
    mkdir -p "$venv"
    touch "$unfinished"
    if command -v uv >/dev/null; then
        uv venv --quiet --allow-existing --python "$python" "$venv"
    else
        "$python" -m venv "$venv" || fail "'python -m venv' failed; on Debian and Ubuntu install python3.12-venv"
    fi
}

target=${SETUP_TARGET:-$(choose_target)}
[[ $target == cpu || $target == gpu ]] || fail "SETUP_TARGET is '$target'; it must be cpu or gpu"

# The folder is part of the stamp: the programs in .venv/bin name it, so a moved copy has to be made anew.
pins=$(cat pyproject.toml .python-version requirements/*.txt scripts/setup.sh | sha256sum | cut -c1-32)
wanted="$target $pins $PWD"
is_current() { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; }

if is_current; then
    say "$venv is up to date ($target)"
    exit 0
fi

# One setup at a time in a folder; the lock is this file itself and goes with the last process that holds it.
exec 9<scripts/setup.sh
if ! flock --nonblock 9; then
    say "another setup is at work in this folder; waiting for it"
    flock 9
    if is_current; then exit 0; fi
fi

if [[ -f $unfinished ]]; then
    say "an earlier setup was interrupted; starting over"
    rm -rf "$venv"
elif [[ -f $stamp && $(<"$stamp") != *" $PWD" ]]; then
    say "$venv was made in another folder; starting over"
    rm -rf "$venv"
elif [[ -d $venv ]] && ! is_python_312 "$venv/bin/python"; then
    fail "$PWD/$venv is not a working Python 3.12 environment; remove it and run this again"
fi
[[ -d $venv ]] || make_venv
touch "$unfinished"
rm -f "$stamp"

# uv, not pip: it takes the override file, and no constraint of the machine's pip configuration reaches it.
uv=$venv/bin/uv
if [[ ! -x $uv ]]; then
    if command -v uv >/dev/null; then
        uv=$(command -v uv)
    else
        pin=$(grep '^uv==' requirements/dev.txt)
        say "installing $pin"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$pin"
    fi
fi

requirements=(-r "requirements/$target.txt" -r requirements/dev.txt)
if [[ $target == cpu ]]; then requirements+=(--override requirements/overrides.txt); fi
say "installing the $target packages (about 7 GB on disk; half a minute from the cache, longer over the network)"
"$uv" pip install --python "$venv/bin/python" "${requirements[@]}" </dev/null
say "installing the project itself, editable"
"$uv" pip install --quiet --python "$venv/bin/python" --no-deps --editable . </dev/null

printf '%s' "$wanted" >"$stamp"
rm -f "$unfinished"
say "$venv is ready ($target) after $SECONDS s"
