# Sourced by tools/demo and tools/test: a virtual environment of their own, from nothing but Python and pip.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# find_python LOWEST HIGHEST: the first interpreter that runs, has venv, and is 3.LOWEST to 3.HIGHEST. PYTHON=... comes first.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3 python3.10 python3.12 python3.13; do
        if "$candidate" - "$1" "$2" >/dev/null 2>&1 <<'PY'
import sys, venv
sys.exit(not int(sys.argv[1]) <= sys.version_info.minor <= int(sys.argv[2]) or sys.version_info.major != 3)
PY
        then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# make_venv DIRECTORY PYTHON EXTRAS: reused as long as the requirements, the interpreter and the place are the same.
make_venv() {
    local directory=$1 python=$2 extras=$3 wanted
    wanted=$("$python" - "$root" "$extras" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [sys.version, sys.executable, *sys.argv[1:]] + [(root / n).read_text() for n in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
    )
    if [ "$(cat "$directory/requirements.sha256" 2>/dev/null)" = "$wanted" ] && "$directory/bin/python" -c "" 2>/dev/null; then
        return 0
    fi
    echo "== setting up $directory with $("$python" --version): the first time takes a minute or two"
    rm -rf "$directory"
    "$python" -m venv "$directory"
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -e "$root[$extras]" -c "$root/constraints.txt"
    echo "$wanted" >"$directory/requirements.sha256"
}
