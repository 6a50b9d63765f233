#!/usr/bin/env bash
# Makes the environment that `make demo` and `make test` run in.
#
#   tools/setup_env.sh [DIR]        DIR: the virtual environment (default .venv)
#
# STACK=onedl installs OneDL's forks of requirements-onedl.txt instead of OpenMMLab's packages.
# It does nothing if DIR was made from the present requirements.
# PYTHON chooses the interpreter (default python3); MMEXPAND_CACHE the folder
# that keeps the built mmcv wheel (default ~/.cache/mmexpand).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac  # mmcv is built in another folder
python=${PYTHON:-python3}
cache=${MMEXPAND_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmexpand}
requirements=$(mktemp)
trap 'rm -rf "$requirements" "${building:-}"' EXIT
case ${STACK:-openmmlab} in
  openmmlab) cat "$root/requirements.txt" >"$requirements" ;;
  onedl)
    grep -vE '^(mmengine|mmcv|mmdet|mmsegmentation)==' "$root/requirements.txt" >"$requirements"
    cat "$root/requirements-onedl.txt" >>"$requirements"
    ;;
  *) echo "setup: STACK is openmmlab or onedl, not $STACK" >&2; exit 1 ;;
esac
stamp=$venv/requirements.installed

say() { printf '[setup %s] %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
pin() { grep -E "^$1==" "$requirements"; }

if cmp -s "$requirements" "$stamp"; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$python is older than Python 3.11, which the pinned versions need; name one of Python 3.11 to 3.13: PYTHON=python3.11 $0"
"$python" -c 'import sys; sys.exit(sys.version_info >= (3, 14))' ||
  die "$python is newer than Python 3.13, the last one that the pinned versions have wheels for; name one of Python 3.11 to 3.13: PYTHON=python3.13 $0"
"$python" -c 'import venv, ensurepip' ||
  die "$python has no venv module; install it (Debian: python3-venv)"
command -v c++ >/dev/null || command -v g++ >/dev/null ||
  die 'no C++ compiler (c++ or g++) found; mmcv is built from source and needs one'

say "making $venv (log of every step follows; the first time about 20 minutes on 2 cores)"
# An incomplete environment is made again: it must never pass for a complete one.
if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then die "$venv exists and is no virtual environment; name another folder"; fi
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

say '1/4 torch and what mmcv is built with (a few minutes: up to 3 GB to download)'
pip install --quiet "$(pin torch)" "$(pin torchvision)" "$(pin numpy)" \
  "$(pin setuptools)" "$(pin wheel)" "$(pin ninja)" "$(pin psutil)"

# pip's own wheel cache does not know which torch a wheel was built against: the
# built wheel is kept under a key that names Python, torch and mmcv.
mmcv=$(pin '(onedl-)?mmcv')
key=$("$venv/bin/python" - "$mmcv" <<'PY'
import platform, sys, torch
device = 'cuda' if torch.cuda.is_available() else 'cpu'
print(f'py{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}-{device}'
      f'-{platform.machine()}-{sys.argv[1].replace("==", "")}')
PY
)
wheels=$cache/$key
if compgen -G "$wheels/*mmcv-*.whl" >/dev/null; then
  say "2/4 mmcv: using the wheel in $wheels"
else
  say "2/4 mmcv: compiling it against this torch (about 15 minutes on 2 cores; kept in $wheels)"
  building=$(mktemp -d)
  # MMCV_WITH_OPS is mmcv's default, stated because an environment may say otherwise. Without debug
  # symbols, which a Python may ask for, the compiler takes less than half the time.
  (cd "$building" && PATH="$venv/bin:$PATH" MMCV_WITH_OPS=1 CFLAGS="${CFLAGS:-} -g0" "$venv/bin/python" -m pip \
    --disable-pip-version-check wheel --no-build-isolation --no-deps --no-cache-dir \
    --wheel-dir "$building" "$mmcv" >"$building/build.log" 2>&1) &
  build=$!
  started=$SECONDS
  while kill -0 "$build" 2>/dev/null; do
    sleep 5
    if (((SECONDS - started) % 60 < 5)); then say "    still compiling, $(((SECONDS - started) / 60)) min"; fi
  done
  wait "$build" || { tail -n 40 "$building/build.log" >&2; die 'mmcv did not build; its last lines are above'; }
  mkdir -p "$wheels"
  built=$(echo "$building"/*mmcv-*.whl)
  cp "$built" "$wheels/$(basename "$built").part"
  mv "$wheels/$(basename "$built").part" "$wheels/$(basename "$built")"
fi

say '3/4 the rest of the requirements (a minute or two)'
pip install --quiet "$wheels"/*mmcv-*.whl -r "$requirements"
pip install --quiet --force-reinstall --no-deps "$(pin opencv-python-headless)"

say '4/4 mmexpand itself'
pip install --quiet --no-deps --no-build-isolation -e "$root"

cp "$requirements" "$stamp"
say 'done'
