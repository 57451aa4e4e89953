#!/usr/bin/env bash
# The one entry, for people and for clusters. The first run sets up .venv beside this file; later ones start at once.
#
#   ./launch.sh                              train the default: a small GPT on the embedded corpus
#   ./launch.sh [train] [group=choice] [key=value]   with -m: a run of every combination of several values
#   ./launch.sh cluster up|join|status|down  a cluster that stays, of many hosts
#   ./launch.sh test|check|plan|prepare|look|evaluate|generate|chat|export|trace|verify-resume|verify-gradient|drill|review|bench|help
#   ./launch.sh setup [extra] [test]         only the environment, with what some data and verbs need, or the tests
#
# Inside a SLURM allocation (sbatch --nodes=4 launch.sh train ...) the job's cluster spans its nodes.
# TRIREME_PYTHON names the Python to set up with; TRIREME_VENV another place for the environment.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi  # sh launch.sh, where sh is dash
[ "${BASH_SOURCE[0]}" = "$0" ] || { echo "launch.sh: run it, as ./launch.sh: it is no file to source" >&2; return 2; }
set -euo pipefail
# What the caller's shell may hand over (SHELLOPTS, CDPATH, ...) means nothing here.
set +o posix +o noclobber +o noglob
unset CDPATH GREP_OPTIONS
{ : >&2; } 2>/dev/null || exec 2>/dev/null  # closed: what is said is lost, and the command goes on
export PYTHONUTF8=1      # all text is UTF-8, whatever the locale
export PYTHONSAFEPATH=1  # else a train.py or json.py of the folder that this is called in would be imported

fail() { printf 'launch.sh: %s\n' "$@" >&2 || true; exit "${code:-1}"; }

pwd -P >/dev/null 2>&1 || fail "the folder that this is called in is no longer there, or may not be read: cd to another"
script="${BASH_SOURCE[0]}"
[ -f "$(dirname -- "$script")/requirements.lock" ] || script="$(readlink -f -- "$script")"  # called through a link to it
root="$(cd -- "$(dirname -- "$script")" && pwd -P)"
if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$root/requirements.lock" ]; then  # sbatch runs a copy; its original is in the repository
    root="$({ scontrol show job "$SLURM_JOB_ID" || true; } | sed -n 's|^ *Command=\(/.*\)|\1|p')"
    root="${root%%/launch.sh*}"
fi
venv="${TRIREME_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
lock="$root/requirements.lock"
verbs="train cluster test check plan prepare look evaluate generate chat export trace verify-resume verify-gradient drill review bench setup help"

[ -f "$lock" ] || fail "this is a copy of launch.sh, and $lock is not there: say it in the repository, as ./launch.sh or sbatch launch.sh"
case "$root$venv" in *:*) fail "Python cannot be run from a path with a colon: move $root, or TRIREME_VENV, to a path without one" ;; esac

usage() { sed -n '2,11s/^# \{0,1\}//p' "$root/launch.sh"; }

# 3.11 or newer, with what making an environment takes.
find_python() {
    local name seen="" names=(python3.13 python3.12 python3.11 python3 python)
    [ -z "${TRIREME_PYTHON:-}" ] || names=("$TRIREME_PYTHON")
    for name in "${names[@]}"; do
        command -v "$name" >/dev/null 2>&1 || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        seen="$name"
        if "$name" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    if [ -n "$seen" ]; then
        fail "$seen lacks the modules venv and ensurepip." \
             "Install them (Debian, Ubuntu: sudo apt install $("$seen" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')), or name another Python: TRIREME_PYTHON=/path/to/python3"
    fi
    fail "no Python 3.11 or newer was found (looked for: ${names[*]})." \
         "Install one from your system's packages, python.org or conda, or name it: TRIREME_PYTHON=/path/to/python3"
}

# A stamp in the environment says that a lock was installed to its end: digest of the lock and of the Python that it was installed for.
digest() { { cat "$1"; "$venv/bin/python" -c 'import sys; print(sys.version)'; } | sha256sum | cut -d' ' -f1; }
write_stamp() { digest "$2" >"$1.new" && mv "$1.new" "$1"; }
mark_checked() { touch "$1" 2>/dev/null || true; }  # only saves the next command the digest: the environment may be read-only
newer_than_lock() { [ -f "$1" ] && [ "$1" -nt "$2" ] && [ -x "$venv/bin/python" ]; }
matches_lock() {
    [ -f "$1" ] && [ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null && [ "$(cat "$1")" = "$(digest "$2")" ]
}

# Before anything is changed: what making an environment in a folder takes.
check_can_set_up() {
    local tool missing=""
    for tool in flock sha256sum; do command -v "$tool" >/dev/null || missing+=" $tool"; done
    [ -z "$missing" ] || fail "setting up $venv needs$missing: install util-linux and coreutils (this is a program for Linux)"
    { mkdir -p "$1" && [ -w "$1" ]; } 2>/dev/null || fail "$1 cannot be written, and $venv is not what $lock says yet." \
        "Name a place for the environment that can be: TRIREME_VENV=/path/to/venv"
}

lock_environment() {
    exec 9<"$root/launch.sh"  # locked itself: there is no other file to leave behind
    if ! flock -n 9; then
        echo "Another launch.sh is setting up $venv: waiting for it." >&2
        flock 9
    fi
}
unlock_environment() { exec 9>&-; }

# pip install with these arguments, its output in the log, its progress on a terminal. Its temporary files are in the environment.
pip_install() {
    local now pip began=$SECONDS
    rm -rf "$venv/tmp"
    mkdir "$venv/tmp"
    TMPDIR="$venv/tmp" "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 &  # keeps fd 9 locked, even orphaned
    pip=$!
    trap 'kill $pip 2>/dev/null || true; exit 130' INT
    trap 'kill $pip 2>/dev/null || true; exit 143' TERM
    while kill -0 $pip 2>/dev/null; do
        if [ -t 2 ]; then
            now="$(grep -E '^(Collecting|Downloading|Installing|Building|Using cached)' "$log" 2>/dev/null | tail -n 1 | cut -c1-70 || true)"
            printf '\r\033[K  %3d s  %s' $((SECONDS - began)) "$now" >&2
        fi
        sleep 0.5
    done
    [ -t 2 ] && printf '\r\033[K' >&2
    wait $pip || fail "pip could not install $2; the last lines of $log:" "$(tail -n 15 "$log")" \
                      "Is a package index reachable (pip config list)? Then run this again."
    trap - INT TERM
    rm -rf "$venv/tmp"
}

# Makes the environment of requirements.lock, unless it is there.
set_up() {
    # The stamp is written last, so an environment without it is incomplete; one whose stamp is older than the lock is checked again.
    local python users stamp="$venv/.ready" log="$venv/setup.log" began=$SECONDS
    if newer_than_lock "$stamp" "$lock"; then return; fi
    if matches_lock "$stamp" "$lock"; then mark_checked "$stamp"; return; fi
    check_can_set_up "$(dirname "$venv")"
    [ ! -e "$venv" ] || check_can_set_up "$venv"
    lock_environment
    if matches_lock "$stamp" "$lock"; then  # by another launch.sh, which was waited for
        unlock_environment
        return
    fi
    python="$(find_python)" || exit $?
    users="$(grep -lsF "$venv/lib/" /proc/[0-9]*/maps | cut -d/ -f3 | head -n 5 | xargs || true)"
    [ -z "$users" ] || fail "$venv is not what $lock says, and is in use (processes $users): it is made anew when they have ended." \
        "Give the command again then, or name another place for this checkout's: TRIREME_VENV=/path/to/venv"
    echo "Setting up $venv with $("$python" -V) (once; some minutes). Log: $log" >&2
    rm -f "$stamp"  # first: a setup killed in what follows is done again
    rm -rf "$venv"
    mkdir "$venv"
    "$python" -m venv "$venv" >>"$log" 2>&1 || fail "python -m venv failed; the last lines of $log:" "$(tail -n 5 "$log")"
    "$venv/bin/python" -c '' 2>/dev/null || fail "$venv/bin/python was made and cannot be run: is the disk mounted with noexec?" \
        "Name a place for the environment on another: TRIREME_VENV=/path/to/venv"
    pip_install -r "$lock"
    write_stamp "$stamp" "$lock"
    echo "Set up in $((SECONDS - began)) s." >&2
    rm -f "$log"
    unlock_environment
}

# Adds a second lock to the environment, requirements-NAME.lock, so that a first run need not wait for it: set_up_more NAME WHAT.
set_up_more() {
    local stamp="$venv/.ready-$1" log="$venv/setup-$1.log" more="$root/requirements-$1.lock" began=$SECONDS
    if newer_than_lock "$stamp" "$more"; then return; fi
    if matches_lock "$stamp" "$more"; then mark_checked "$stamp"; return; fi
    check_can_set_up "$venv"
    lock_environment
    if ! matches_lock "$stamp" "$more"; then
        echo "Adding to $venv what $2 (once; a minute). Log: $log" >&2
        rm -f "$stamp" "$log"
        pip_install -r "$more" -c "$lock"
        write_stamp "$stamp" "$more"
        echo "Added in $((SECONDS - began)) s." >&2
        rm -f "$log"
    fi
    unlock_environment
}
set_up_extra() { set_up_more extra "some kinds of data need"; }
set_up_tests() { set_up_extra && set_up_more test "tests and checks need"; }

# Shows a command, with its secrets hidden, if it can.
show() {
    local dim="" plain=""
    if [ -t 2 ]; then dim=$'\033[2m'; plain=$'\033[0m'; fi
    printf '%s+ %s%s\n' "$dim" "${*/#"$venv/"/"${venv#"$PWD/"}/"}" "$plain" | "$python" -I -S -X utf8 "$root/train/util/redact.py" >&2 2>/dev/null || true
}

# Becomes a command of the product, so that signals go straight to it. While Python itself starts, Ctrl-C would end in a
# traceback of Python's: the command unblocks it when it can (train/util/streams.py). Older coreutils cannot block it.
run() {
    show "$@"
    if env --block-signal=INT true 2>/dev/null; then exec env --block-signal=INT "$@"; fi
    exec "$@"
}

verb="${1:-train}"
case " $verbs " in
    *" $verb "*) [ $# -eq 0 ] || shift ;;
    *)
        case "$verb" in
            -h|--help) verb=help ;;
            *=*|-*) verb=train ;;  # an option or a choice: it is training that is meant
            *)
                near=""
                for known in $verbs; do case "$known" in "${verb:0:2}"*) near=" Did you mean '$known'?" ;; esac; done
                code=2 fail "there is no verb '$verb'.$near Verbs: $verbs"
                ;;
        esac
        ;;
esac
if [ "$verb" = help ]; then usage; exit 0; fi

if [ "$verb" = setup ]; then
    for name in "$@"; do case "$name" in extra|test) ;; *) code=2 fail "setup: there is no '$name': say extra, test, or nothing" ;; esac; done
    set_up
    case " $* " in *" extra "*) set_up_extra ;; esac
    case " $* " in *" test "*) set_up_tests ;; esac
    exit 0
fi
set_up
case "$verb ${1:-}" in "test "*|"check "*|"bench gpu") set_up_tests ;; esac  # bench gpu begins with the tests of a GPU
now="${EPOCHREALTIME:-$(date +%s.%N)}"  # bash has the clock since 5.0
export TRIREME_T0="${now/,/.}"  # the run begins here: its start is not charged with the environment's set-up
export DS_BUILD_OPS=0
home=~
# torch makes this folder wherever it is imported, else in the temporary directory
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-${XDG_CACHE_HOME:-$home/.cache}/trireme/inductor}"
absolute="$(tr : '\n' <<<"${PYTHONPATH:-}" | grep '^/' | paste -sd : || true)"  # the others mean the folder that this is called in
export PYTHONPATH="$root${absolute:+:$absolute}"
python="$venv/bin/python"

case "$verb" in
    train|cluster|verify-resume|verify-gradient|drill) run "$python" -m cluster "$verb" "$@" ;;
    plan|prepare|look|evaluate|generate|chat|export|trace) run "$python" -m train "$verb" "$@" ;;
    review) run "$python" -m review "$@" ;;
    bench)
        unset TRIREME_T0  # the runs that it makes begin when it makes them
        run "$python" -m bench.tools.run "$@"
        ;;
    test)
        export OMP_NUM_THREADS=1
        cd "$root"
        show "$python" -m pytest -n 2 "$@"
        exec "$python" -m pytest -n 2 "$@"  # one has the clusters, the other the rest: tests/conftest.py; -n 0: here, with --pdb
        ;;
    check)
        cd "$root"
        for tool in "ruff check ." "ruff format --check ." mypy; do
            printf '+ %s -m %s\n' "$python" "$tool" >&2
            # shellcheck disable=SC2086 # a tool and its arguments
            "$python" -m $tool
        done
        ;;
esac
