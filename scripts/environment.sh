# Sourced by run_train.sh, run_tests.sh and multinode_trainer.slurm, which set $root to the repository before.
# shellcheck shell=bash disable=SC2154

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# Sets $base to a Python of at least 3.10: $PYTHON, else python3. Sets $base_has_all to "yes" where it has the modules
# that are named as arguments. They are looked up and not imported, and the current folder does not count.
find_python() {
    local probe answer version age
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null 2>&1 || fail "there is no $base: install Python 3.10 or newer, or set PYTHON to one"
    probe='
import sys
from importlib.util import find_spec
sys.path[:] = [folder for folder in sys.path if folder]
has_all = all(find_spec(module) for module in sys.argv[1:])
age = "new" if sys.version_info >= (3, 10) else "old"
print("%d.%d" % sys.version_info[:2], age, "yes" if has_all else "no", sys.executable)'
    answer=$("$base" -c "$probe" "$@" 2>/dev/null) ||
        fail "$base is too old or does not start: set PYTHON to a Python of 3.10 or newer"
    read -r version age base_has_all base <<<"$answer"
    [ "$age" = new ] || fail "$base is Python $version, and titanlite needs 3.10 or newer: set PYTHON to one"
}

# Sets $python to an interpreter with titanlite and the named modules: the caller's own where it has them all, else that
# of .venv in the repository, which is made, completed or repaired first.
use_environment() {
    find_python titanlite "$@"
    if [ "$base_has_all" = yes ]; then
        python=$base
        return
    fi
    local venv=$root/.venv wanted found
    local stamp=$venv/titanlite-installed # what was installed; "unfinished" while it is being installed
    wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
    found=$(cat "$stamp" 2>/dev/null || true)
    python=$venv/bin/python
    if [ "$found" = "$wanted" ] && [ -x "$python" ]; then return; fi
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$base has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"
    printf '%s: installing titanlite and torch into .venv; this takes some minutes, once\n' "${0##*/}" >&2
    if [ ! -x "$python" ] || [ "$found" = unfinished ]; then
        rm -rf "$venv"
        mkdir "$venv"
    fi
    echo unfinished >"$stamp"
    if [ ! -x "$python" ]; then "$base" -m venv "$venv" >&2 || fail "could not make $venv"; fi
    if ! (cd "$root" && "$python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]') >&2; then
        printf '%s\n' "$found" >"$stamp" # pip has taken back what it did
        fail "the installation failed (see above): start again to repeat it"
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

# What tells one writing of a run's status.json from another.
status_mark() {
    if [ -f "$1" ]; then
        ls -i "$1"
        cksum "$1"
    fi
}

# The exit code of a run. $1: its status.json; $2: status_mark of it before the run; $3: torchrun's exit code; $4: "yes"
# where the run was asked to stop. 75 (EX_TEMPFAIL) means: not finished, start it again and it goes on.
run_exit_code() {
    local state=
    if [ "$(status_mark "$1")" != "$2" ]; then
        state=$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$1" | head -n 1)
    fi
    case $state in
        finished) echo 0 ;;
        preempted) echo 75 ;;
        failed) echo "$3" ;;
        *) # none written, or "running": it was stopped too early or too hard to say so, or it failed
            if [ "$3" != 0 ] && [ "$4" = yes ]; then echo 75; else echo "$3"; fi ;;
    esac
}
