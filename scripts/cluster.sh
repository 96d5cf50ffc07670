#!/usr/bin/env bash
# A Ray cluster over several machines, closed to everybody without its token.
# Usage:
#   bash scripts/cluster.sh head [PORT]                      on the first machine (port 6379)
#   bash scripts/cluster.sh join FIRST_MACHINE:PORT          on every other
#   bash scripts/cluster.sh check FIRST_MACHINE:PORT [key=value ...]   on any: one line for each finding; the arguments
#                                                            of the training name the folders that must be there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 2
}

last_line() {
    grep -v '^ *$' <<<"$1" | tail -n 1
}

[[ -d .venv ]] && PATH=$PWD/.venv/bin:$PATH
command -v ray >/dev/null || fail "no ray on $(hostname); run bash scripts/setup.sh there, then source .venv/bin/activate"
# Without a token a head listens on all interfaces and runs anyone's code; Ray's own default is none when joining.
export RAY_AUTH_MODE=token
command=${1:-}
address=${2:-}

if [[ $command == head && $# -le 2 ]]; then
    port=${address:-6379}
    ray get-auth-token --generate >/dev/null 2>&1 || fail "no token could be written to ~/.ray on $(hostname)"
    said=$(ray start --head --port="$port" --include-dashboard=false --disable-usage-stats 2>&1) ||
        fail "$(hostname) could not start a head on port $port: $(last_line "$said")"
    address=$(grep -o "address='[^']*'" <<<"$said" | cut -d "'" -f 2)
    echo "The head is started. On every other machine, once ~/.ray/auth_token of this one is there too:"
    echo "    bash scripts/cluster.sh join $address"
    echo "Then, on any:"
    echo "    bash scripts/cluster.sh check $address"
    echo "    RAY_AUTH_MODE=token RAY_ADDRESS=$address python3 -m verl.trainer.main trainer.nnodes=... ..."
elif [[ ($command == join && $# -eq 2 || $command == check && $# -ge 2) && $address == *:* ]]; then
    ray get-auth-token >/dev/null 2>&1 ||
        fail "no token on $(hostname); copy ~/.ray/auth_token of the first machine there (readable for you alone)"
    timeout 10 bash -c "</dev/tcp/${address%:*}/${address##*:}" 2>/dev/null ||
        fail "$address cannot be reached from $(hostname); is the head started there, and its port open?"
    if [[ $command == join ]]; then
        said=$(ray start --address="$address" --disable-usage-stats 2>&1) ||
            fail "$(hostname) could not join $address: $(last_line "$said")"
        echo "$(hostname) has joined $address"
    else
        shift 2
        exec python3 scripts/cluster.py "$address" "$@"
    fi
else
    fail "give head [PORT], join FIRST_MACHINE:PORT or check FIRST_MACHINE:PORT [key=value ...]"
fi
