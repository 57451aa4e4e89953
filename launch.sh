#!/usr/bin/env bash
# The one entry, for people and for clusters. The first run sets up .venv beside this file; later ones start at once.
#
#   ./launch.sh                              train the default: a small GPT on the embedded corpus, 2 ZeRO workers
#   ./launch.sh [train] [group=choice] [key=value]   with -m: a run of every combination of several values
#   ./launch.sh cluster up|join|status|down  a cluster that stays, of many hosts
#   ./launch.sh test|check|prepare|evaluate|generate|export|trace|verify-resume|drill|review|bench|help
#
# Inside a SLURM allocation (sbatch --nodes=4 launch.sh train ...) the job's cluster spans its nodes.
# TRIREME_PYTHON names the Python to set up with; TRIREME_VENV another place for the environment.
set -euo pipefail
export TRIREME_T0="${EPOCHREALTIME/,/.}"

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$root/requirements.lock" ]; then  # sbatch runs a copy; this is where it was made
    root="$({ scontrol show job "$SLURM_JOB_ID" || true; } | sed -n 's|^ *Command=\([^ ]*\)/launch\.sh.*|\1|p')"
fi
venv="${TRIREME_VENV:-$root/.venv}"
lock="$root/requirements.lock"
verbs="train cluster test check prepare evaluate generate export trace verify-resume drill review bench help"

fail() { printf 'launch.sh: %s\n' "$@" >&2; exit "${code:-1}"; }

[ -f "$lock" ] || fail "this is a copy of launch.sh, and $lock is not there: say it in the repository, as ./launch.sh or sbatch launch.sh"

usage() { sed -n '2,10s/^# \{0,1\}//p' "$root/launch.sh"; }

# 3.11 or newer, with what making an environment takes.
find_python() {
    local name seen=""
    for name in ${TRIREME_PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
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
    fail "no Python 3.11 or newer was found (looked for: ${TRIREME_PYTHON:-python3.13 python3.12 python3.11 python3 python})." \
         "Install one from your system's packages, python.org or conda, or name it: TRIREME_PYTHON=/path/to/python3"
}

# What the environment must have been made of: the lock, and the Python in it.
wanted() { { cat "$lock"; "$1" -c 'import sys; print(sys.version)'; } | sha256sum | cut -d' ' -f1; }

set_up() {
    # The stamp is written last, so an environment without it is half made, and one older than the lock is looked at again.
    if [ -f "$venv/.ready" ] && [ "$venv/.ready" -nt "$lock" ] && [ -x "$venv/bin/python" ]; then return; fi
    mkdir -p "$(dirname "$venv")"
    exec 9<"$root/launch.sh"  # locked itself: there is no other file to leave behind
    if ! flock -n 9; then
        echo "Another launch.sh is setting up $venv: waiting for it." >&2
        flock 9
    fi
    local python log began now users
    if [ -f "$venv/.ready" ] && [ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null \
        && [ "$(cat "$venv/.ready")" = "$(wanted "$venv/bin/python")" ]; then
        touch "$venv/.ready"
        exec 9>&-
        return
    fi
    python="$(find_python)" || exit $?
    users="$(grep -lsF "$venv/lib/" /proc/[0-9]*/maps | cut -d/ -f3 | head -n 5 | xargs || true)"
    [ -z "$users" ] || fail "$venv is not what $lock says, and is in use (processes $users): it is made anew when they have ended." \
        "Give the command again then, or name another place for this checkout's: TRIREME_VENV=/path/to/venv"
    log="$(mktemp "${TMPDIR:-/tmp}/trireme-setup-XXXXXX.log")"
    began=$SECONDS
    echo "Setting up $venv with $("$python" -V) (once; some minutes). Log: $log" >&2
    rm -f "$venv/.ready"  # first: a setup killed in what follows is done again
    rm -rf "$venv"
    "$python" -m venv "$venv" >>"$log" 2>&1 || fail "python -m venv failed; the last lines of $log:" "$(tail -n 5 "$log")"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -r "$lock" >>"$log" 2>&1 &  # keeps the lock, even orphaned
    local pip=$!
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
    wait $pip || fail "pip could not install $lock; the last lines of $log:" "$(tail -n 15 "$log")" \
                      "Is a package index reachable (pip config list)? Then run this again."
    trap - INT TERM
    wanted "$venv/bin/python" >"$venv/.ready.new"
    mv "$venv/.ready.new" "$venv/.ready"
    echo "Set up in $((SECONDS - began)) s." >&2
    rm -f "$log"
    exec 9>&-
}

# What is secret in a command, as train/util/redact.py has it: passwords in URLs, and what is given to keys named like one.
hide() {
    sed -E -e "s#([a-zA-Z0-9+.-]+:/+)([^ '\"@/]*:[^ '\"@]*|[^ '\"@/]+)@#\1[hidden]@#g" \
        -e "s#([?&][a-zA-Z0-9_.-]*(key|token|secret|password|signature|credential|sig)[a-zA-Z0-9_.-]*=)[^& '\"]+#\1[hidden]#gI" \
        -e "s#text_key=#text\x01key=#g" -e "s#(([._-]key|token|secret|password|passwd|passphrase)=)[^ '\",]+#\1[hidden]#gI" -e "s#\x01#_#g"
}

# Shows the command, then becomes it, so that signals go straight to it.
run() {
    local dim="" plain=""
    if [ -t 2 ]; then dim=$'\033[2m'; plain=$'\033[0m'; fi
    printf '%s+ %s%s\n' "$dim" "${*/#$venv/${venv#"$PWD/"}}" "$plain" | hide >&2
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

set_up
export DS_BUILD_OPS=0
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python="$venv/bin/python"

case "$verb" in
    train|cluster|verify-resume|drill) run "$python" -m cluster "$verb" "$@" ;;
    prepare|evaluate|generate|export|trace) run "$python" -m train "$verb" "$@" ;;
    review) run "$python" -m review "$@" ;;
    bench)
        [ $# -gt 0 ] || code=2 fail "bench needs a name: $(cd "$root/bench" && echo *.py | sed 's/\.py//g; s/__init__ *//')"
        name="$1"; shift
        unset TRIREME_T0  # the runs that it makes begin when it makes them
        run "$python" -m "bench.$name" "$@"
        ;;
    test)
        export OMP_NUM_THREADS=1
        cd "$root"
        run "$python" -m pytest -n 2 "$@"  # one has the clusters, the other the rest: tests/conftest.py; -n 0: here, with --pdb
        ;;
    check)
        cd "$root"
        for tool in "ruff check ." "ruff format --check ." mypy; do
            printf '+ %s -m %s\n' "$python" "$tool" >&2
            # shellcheck disable=SC2086  a tool and its arguments
            "$python" -m $tool
        done
        ;;
esac
