#!/usr/bin/env bash
# Makes the virtual environment .venv with everything in constraints.txt; called by `make setup`. Installs nothing global,
# but for the C headers that Pillow-SIMD compiles against, and those only where they are missing, on Debian, as root.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }
quietly() { # the output of a command only where it fails
  local log
  log=$(mktemp)
  "$@" >"$log" 2>&1 || { cat "$log" >&2; rm -f "$log"; fail "failed, for the reason above: $*"; }
  rm -f "$log"
}

# 1. Python >= 3.11
python=${PYTHON:-}
if [ -z "$python" ]; then
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$name; break; fi
  done
fi
[ -n "$python" ] || fail "no Python >= 3.11 found (looked for python3, python3.11 to python3.14); set PYTHON=/path/to/python3"

# 2. a C compiler, Python's headers and those of the picture formats
packages=()
command -v "${CC:-cc}" >/dev/null || packages+=(gcc libc6-dev)
have() { printf '#include <stdio.h>\n#include <%s>\n' "$1" | "${CC:-cc}" -E -x c - >/dev/null 2>&1; }
have jpeglib.h || packages+=(libjpeg-dev)
have zlib.h || packages+=(zlib1g-dev)
have webp/decode.h && have webp/demux.h || packages+=(libwebp-dev)
have tiffio.h || packages+=(libtiff-dev)
command -v pkg-config >/dev/null || packages+=(pkg-config) # how Pillow finds FreeType
pkg-config --exists freetype2 2>/dev/null || packages+=(libfreetype-dev)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  packages+=(python3-dev)
if [ ${#packages[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${packages[*]} (Pillow-SIMD is compiled against them)"
    quietly apt-get update -qq
    quietly env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"
  else
    fail "missing: ${packages[*]}. Run: sudo apt-get install -y ${packages[*]}   (other systems: the same libraries under their names there), then the same command again"
  fi
fi

# 3. the environment
say "virtual environment .venv ($("$python" --version))"
"$python" -m venv .venv 2>/dev/null || fail "$python cannot make virtual environments. Run: sudo apt-get install -y python3-venv, then the same command again"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
quietly pip install -c constraints.txt pip setuptools wheel pybind11

# 4. Pillow-SIMD: compiled here, with AVX2 where the processor has it
cc=${CC:-cc}
if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then cc="$cc -mavx2"; fi
wanted=$(sed -n 's/^pillow-simd==//p' constraints.txt)
built="pillow-simd $wanted by $cc"
if [ "$(cat .venv/pillow-simd.built 2>/dev/null)" != "$built" ]; then
  say "compiling Pillow-SIMD $wanted ($cc; JPEG, zlib, WebP, TIFF, FreeType)"
  CC="$cc" quietly pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps --no-binary pillow-simd \
    -C jpeg=enable -C zlib=enable -C webp=enable -C tiff=enable -C freetype=enable "pillow-simd==$wanted"
  printf '%s\n' "$built" >.venv/pillow-simd.built
fi

# 5. everything else
say "installing torch, DALI and the rest (about 2 GB on disk; more with torch's CUDA build)"
quietly pip uninstall -y penstock # the distribution's name before penstock-imagenet
quietly pip install -c constraints.txt --no-build-isolation -e '.[dev,s3,parquet,ray,service,retrieval,export]'
.venv/bin/python - <<'PY' || fail "Pillow-SIMD lacks a format. Run: rm -r .venv, then the same command again"
import sys
from PIL import features
sys.exit(not all(features.check(name) for name in ("jpg", "zlib", "webp", "libtiff", "freetype2")))
PY
touch .venv/ready
say "done: .venv is ready (activate it with: . .venv/bin/activate)"
