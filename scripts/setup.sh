#!/usr/bin/env bash
# Makes .venv with Python 3.12 and the packages of requirements/cpu.txt or gpu.txt, which lock every one of them with
# its hashes; nothing else gets installed. Does nothing when .venv is up to date.
# Usage: bash scripts/setup.sh
#   SETUP_TARGET=cpu|gpu   the lock to install from (default: gpu where an NVIDIA device is visible)
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

(($# == 0)) || fail "unknown argument '$1'; this script takes none. SETUP_TARGET=cpu|gpu chooses the packages"
target=${SETUP_TARGET:-$(choose_target)}
[[ $target == cpu || $target == gpu ]] || fail "SETUP_TARGET is '$target'; it must be cpu or gpu"
lock=requirements/$target.txt

[[ -w . ]] || fail "$PWD cannot be written to, and .venv and runs/ are made in it; work in a copy: git clone $PWD COPY"

# The folder is part of the stamp: the programs in .venv/bin name it, so a moved copy has to be made anew.
pins=$(cat pyproject.toml setup.py .python-version "$lock" scripts/setup.sh | sha256sum | cut -c1-32)
wanted="$target $pins $PWD"
is_current() { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; }

if is_current; then
    say "$venv is up to date ($target)"
    exit 0
fi

[[ "$(uname -s) $(uname -m)" == "Linux x86_64" ]] || fail "the locks are for Linux on x86_64, this is" \
    "$(uname -s) on $(uname -m); there, 'pip install .' installs the rewards alone"

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

# pip installs uv, from the lock too, and uv the rest: it is ten times as fast, and no constraint of the machine's pip
# configuration reaches it.
uv=$venv/bin/uv
if [[ ! -x $uv ]]; then
    if command -v uv >/dev/null; then
        uv=$(command -v uv)
    else
        say "installing uv"
        sed -n '/^uv==/,/^ *# via/p' "$lock" >"$venv/uv.txt"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
            -r "$venv/uv.txt" || fail "pip could not install uv (see above); is the package index within reach?"
    fi
fi

say "installing the $target packages (about 7 GB on disk; half a minute from the cache, longer over the network)"
"$uv" pip sync --python "$venv/bin/python" --require-hashes --quiet "$lock" </dev/null ||
    fail "not all packages of $lock could be installed (see above); run this again when the package index is within" \
        "reach and the disk has 15 GB free: what has been downloaded is kept"
say "installing the project itself, editable"
"$uv" pip install --quiet --offline --python "$venv/bin/python" --no-deps --no-build-isolation --editable . </dev/null

printf '%s' "$wanted" >"$stamp"
rm -f "$unfinished"
say "$venv is ready ($target) after $SECONDS s"
