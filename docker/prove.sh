#!/usr/bin/env bash
# Proves docker/Dockerfile where there is no Docker engine: as root on Debian, debootstrap makes the base image, buildah
# (chroot isolation, vfs storage) builds both targets, and the commands run inside as the image's user. It takes a
# quarter of an hour or so, and up to 20 GB in ${TMPDIR:-/tmp}, given back at the end; it needs Debian's and Python's
# packages, by the configuration of apt and pip on this machine.
#   bash docker/prove.sh [--keep]      (--keep: leave images and volumes for a look)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD began=$SECONDS checks=0
say() { printf 'prove: %s\n' "$*"; }
fail() { printf 'prove: %s\n' "$*" >&2; exit 2; }
[ "$(id -u)" = 0 ] || fail "user $(id -u): debootstrap and buildah need root here; run it as root"
command -v apt-get >/dev/null || fail "no apt-get: this proof needs Debian; elsewhere docker build does the same"
room=$(df --output=avail -B 1G "${TMPDIR:-/tmp}" | tail -1)
[ "$room" -ge 20 ] || fail "${TMPDIR:-/tmp}: $room GB free, the proof needs 20; make room, or set TMPDIR"

# 1. the tools
missing=()
for tool in buildah debootstrap; do command -v $tool >/dev/null || missing+=($tool); done
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/penstock-prove.XXXXXX")
export BUILDAH_ISOLATION=chroot TMPDIR=$work
store() { buildah --storage-driver vfs --root "$work/images" --runroot "$work/state" "$@"; }
clean() {
  [ -z "${pid:-}" ] || kill -KILL "$pid" 2>/dev/null || true
  store rm --all >/dev/null 2>&1 || true
  store rmi --all --force >/dev/null 2>&1 || true
  if grep -q " $work" /proc/self/mountinfo; then # what is mounted is not ours to delete
    say "left behind, because something is mounted there still: $work"
  else
    rm -rf "$work"
  fi
}
if [ "${1:-}" = --keep ]; then say "everything stays in $work"; else trap clean EXIT; fi
mkdir "$work/host" "$work/vol"

# 2. how this machine reaches its packages: mounted while the image is built, and never in it
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)
release=$(sed -n 's/^ARG BASE=debian:\([a-z]*\).*/\1/p' docker/Dockerfile)
[ -n "$mirror" ] || fail "apt knows no mirror of Debian; run apt-get update"
echo "deb $mirror $release main" >"$work/host/sources.list"
apt-config dump | grep -E '^Acquire::(http|https|Check|Retries)' >"$work/host/apt.conf" || true
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
"$python" - "$work/host" <<'PY'
import ast, pathlib, re, shutil, subprocess, sys

listed = [sys.executable, "-m", "pip", "config", "list"]
said = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
values = {}
for name in sorted(found, key=lambda name: name.startswith(":env:")):  # the environment has the last word
    if name.startswith(("global.", ":env:.", "install.")):
        values[name.rpartition(".")[2]] = " ".join(ast.literal_eval(found[name]).split())
folder = pathlib.Path(sys.argv[1])
if "cert" in values:  # at a place of its own: the package ca-certificates writes the usual one
    shutil.copy(values["cert"], folder / "ca.crt")
    values["cert"] = "/etc/host-ca.crt"
if "constraint" in values:
    (folder / "constraints.txt").write_text("".join(pathlib.Path(name).read_text() for name in values["constraint"].split()))
    values["constraint"] = "/etc/host-constraints.txt"
(folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
local = {name: value for name, value in values.items() if name in ("find-links", "index-url", "extra-index-url")}
parts = {part.removeprefix("file://") for value in local.values() for part in value.split()}
paths = {part.removesuffix("/simple") for part in parts if part.startswith("/") and pathlib.Path(part).exists()}
(folder / "paths").write_text("".join(f"{path}\n" for path in sorted(paths)))
hosts = {host for value in values.values() for host in re.findall(r"https?://(?:[^@/\s]*@)?([^/:\s]+)", value)}
(folder / "hosts").write_text("".join(f"{host}\n" for host in sorted(hosts)))
PY
sed -E 's#^[a-z]+://([^/:]+).*#\1#' <<<"$mirror" >>"$work/host/hosts"
mounts=(--volume "$work/host/sources.list:/etc/apt/sources.list:ro" --volume "$work/host/apt.conf:/etc/apt/apt.conf:ro"
  --volume "$work/host/pip.conf:/etc/pip.conf:ro")
for name in ca.crt constraints.txt; do
  [ -f "$work/host/$name" ] && mounts+=(--volume "$work/host/$name:/etc/host-$name:ro")
done
while read -r path; do mounts+=(--volume "$path:$path:ro"); done <"$work/host/paths"

# 3. the base image and both targets
quietly() { # the end of a command's output only where it fails
  "$@" >"$work/log" 2>&1 || { tail -30 "$work/log" >&2; fail "failed, for the reason above: $*"; }
}
say "base image: debootstrap $release"
quietly debootstrap --variant=minbase "$release" "$work/base" "$mirror"
rm -rf "$work/base"/var/cache/apt/archives/*.deb "$work/base"/var/lib/apt/lists/*
: >"$work/base/etc/apt/sources.list"
base=$(store from scratch)
store copy --quiet "$base" "$work/base" / >/dev/null
store commit --quiet --rm "$base" localhost/base >/dev/null
rm -rf "$work/base"
for target in build train; do # without --layers: vfs would copy gigabytes for every instruction
  since=$SECONDS
  quietly store build --layers=false --target $target --build-arg BASE=localhost/base "${mounts[@]}" \
    --tag localhost/penstock-$target -f docker/Dockerfile .
  store from --quiet --name $target localhost/penstock-$target >/dev/null
  say "target $target: built in $((SECONDS - since)) s, $(du -sh "$(store mount $target)" | cut -f1)"
done

# 4. what is in them
inside() { # a command in a container, stopped after a quarter of an hour
  timeout 900 buildah --storage-driver vfs --root "$work/images" --runroot "$work/state" run "$@"
}
ok() { checks=$((checks + 1)) && say "ok: $*"; }
for target in build train; do
  user=$(inside $target -- id -u)
  [ "$user" = 1000 ] || fail "the user in $target is $user, not 1000"
  place=$(store mount $target)
  store inspect $target >"$work/inspected"
  if found=$(grep -rIlF -f "$work/host/hosts" "$place/etc" "$place/opt/penstock" "$work/inspected"); then
    fail "$target holds the name of a mirror of this machine: $found"
  fi
  caches=("$place/var/lib/apt/lists" "$place/var/cache/apt/archives" "$place/root/.cache")
  left=$(find "${caches[@]}" -type f -size +0 ! -name lock 2>/dev/null | head -3) || true
  [ -z "$left" ] || fail "$target holds what a package manager left: $left"
  ok "$target: user 1000, no mirror's name, no package manager's cache"
done
read -r torch cuda < <(inside train -- python -c 'import torch; print(torch.__version__, torch.version.cuda)')
! inside build -- python -c 'import torch' 2>/dev/null || fail "the target build holds torch"
headers=$(inside train -- python -c 'import sysconfig; print(sysconfig.get_path("include"))')
inside train -- sh -c "echo '#include <Python.h>' | gcc -fsyntax-only -x c -I $headers -"
ok "build without torch; train with torch $torch, and with the compiler and the headers that Triton asks for"

# 5. the commands, by their entry points
volume() { mkdir -p "$work/vol/$1" && chown "${2:-1000:1000}" "$work/vol/$1" && printf '%s' "$work/vol/$1"; }
command_of() { store inspect --type container --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$1"; }
entered() { # entered TARGET [option of buildah run]... -- argument...
  local target=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  # shellcheck disable=SC2046 # the words of an entry point have no spaces
  inside "${options[@]}" "$target" -- $(command_of "$target") "$@"
}
refused() { # refused WHAT WORDS TARGET [option]... -- argument...: one line with the words, exit code 2
  local what=$1 words=$2 code=0
  shift 2
  entered "$@" >/dev/null 2>"$work/said" || code=$?
  said=$(grep -vE '^(subprocess exited with|Error: exit) status [0-9]+$' "$work/said" || true)
  if [ $code != 2 ] || [ "$(wc -l <<<"$said")" != 1 ] || ! grep -qF -- "$words" <<<"$said"; then
    fail "$what: expected exit code 2 and one line with '$words', got $code and: $said"
  fi
  ok "$what: ${said#Error: }"
}
all=$(volume demo) shards=$(volume shards) runs=$(volume runs) empty=$(volume empty)
since=$SECONDS
quietly inside --volume "$all:/data" train -- python tools/demo.py --out /data/demo --set train.steps=60
found=$(grep -o 'centre view top-1 error [0-9.]* %' "$work/log" | head -1)
ok "the demo, of 60 steps, in train as user 1000, in $((SECONDS - since)) s: $found"
raw="$all/demo/drawn/raw"
quietly entered build --volume "$raw:/raw:ro" --volume "$shards:/data" -- /raw /data/set --limit 300
ok "build: RAW read-only → /data/set"
data=(--volume "$shards:/data:ro") to=(--volume "$runs:/runs")
tiny=(train --data /data/set --recipe tiny --set train.steps=2 --set train.batch_size=16)
quietly entered train "${data[@]}" "${to[@]}" -- "${tiny[@]}" --out /runs/1 --devices cpu,cpu
ok "train: DATASET read-only → /runs/1"
secret=$(volume secret)
openssl rand -hex 32 >"$secret/token" && chown 1000:1000 "$secret/token" && chmod 400 "$secret/token"
feed=(penstock feed --root /data --port 0 --token-file /run/secrets/token)
inside "${data[@]}" --volume "$secret:/run/secrets:ro" train -- "${feed[@]}" >"$work/feed" 2>&1 &
feeding=$!
for _ in $(seq 120); do grep -q ' (pid ' "$work/feed" || sleep 1; done
serves='^serving 1 data set below /data at grpc://(127.0.0.1:[0-9]+) \(pid ([0-9]+)\)$'
read -r address pid < <(sed -nE "s#$serves#\1 \2#p" "$work/feed") || fail "feed does not serve: $(cat "$work/feed")"
fed=("${tiny[@]}" --devices cpu,cpu --feed "$address")
knows=(--volume "$secret:/run/secrets:ro" --env PENSTOCK_FEED_TOKEN_FILE=/run/secrets/token)
quietly entered train "${data[@]}" "${to[@]}" "${knows[@]}" -- "${fed[@]}" --out /runs/fed
ok "feed: a worker with a token; train --feed: DATASET by way of it → /runs/fed"
refused "train --feed without the token" "asks for a token" train "${data[@]}" "${to[@]}" -- "${fed[@]}" --out /runs/2
kill -TERM "$pid" && code=0 && wait $feeding || code=$?
[ $code = 143 ] || fail "feed: expected exit code 143 after SIGTERM, got $code and: $(cat "$work/feed")"
pid=
ok "feed: SIGTERM ends it"
site=$(volume site) from=(--volume "$raw:/raw:ro")
server=(penstock serve --root /data --raw-root /raw --host 0.0.0.0 --port 0)
code=0
inside --volume "$site:/data" "${from[@]}" train -- "${server[@]}" >"$work/log" 2>&1 || code=$?
[ $code = 2 ] && grep -q 'token create' "$work/log" || fail "serve without a token: exit code $code and: $(cat "$work/log")"
ok "serve: at 0.0.0.0 without a token: $(grep -m 1 '^Error' "$work/log")"
inside --volume "$site:/data" train -- penstock token create --root /data --scope write >"$work/token" 2>"$work/log"
inside --volume "$site:/data" "${from[@]}" train -- "${server[@]}" --stop-jobs >"$work/serve" 2>&1 &
serving=$!
for _ in $(seq 120); do grep -q ' (pid ' "$work/serve" || sleep 1; done
serves='^serving /data at http://0\.0\.0\.0:([0-9]+) \(pid ([0-9]+)\)$'
read -r port pid < <(sed -nE "s#$serves#\1 \2#p" "$work/serve") || fail "serve does not serve: $(cat "$work/serve")"
ask=(--env "PENSTOCK_URL=http://127.0.0.1:$port" --env "PENSTOCK_TOKEN=$(cat "$work/token")" train -- penstock)
quietly inside "${ask[@]}" submit build /raw set --limit 300 --wait
quietly inside "${ask[@]}" submit train set 1 --recipe tiny --set train.steps=2 --set train.batch_size=16 --wait
[ -f "$site/datasets/set/dataset.json" ] && [ -d "$site/runs/1/checkpoints" ] || fail "serve: no data set or no run below $site"
ok "serve: a build and a run, submitted from another container with a token → /data/datasets/set, /data/runs/1"
kill -TERM "$pid" && code=0 && wait $serving || code=$?
[ $code = 143 ] || fail "serve: expected exit code 143 after SIGTERM, got $code and: $(cat "$work/serve")"
pid=
ok "serve: SIGTERM ends it"
other=$(volume other 4242:4242)
theirs=(--user 4242:4242 --volume "$other:/runs")
quietly entered train "${data[@]}" "${theirs[@]}" -- "${tiny[@]}" --out /runs/1 --devices cpu,cpu
ok "train: the same as user 4242, whom /etc/passwd does not have, on a volume of user 4242"

# 6. what goes wrong, one line each
if [ "$cuda" = None ]; then gpu="built without CUDA"; else gpu="--gpus all"; fi
mount="docker run --volume FOLDER" asks="is the volume mounted?" run=("${tiny[@]}" --out /runs/2)
refused "no GPU" "$gpu" train "${data[@]}" "${to[@]}" -- "${run[@]}" --devices cuda:0,cuda:1
refused "DATASET: no volume" "$mount:/data" train "${to[@]}" -- "${run[@]}"
refused "DATASET: an empty volume" "$asks" train --volume "$empty:/data" "${to[@]}" -- "${run[@]}"
refused "RUN: no volume" "$mount:/runs" train "${data[@]}" -- "${run[@]}"
refused "RUN: a read-only volume" "without :ro" train "${data[@]}" --volume "$runs:/runs:ro" -- "${run[@]}"
refused "RUN: another user's volume" "--user 4242:4242" train "${data[@]}" --volume "$other:/runs" -- "${run[@]}"
data=(--volume "$shards:/data") run=(/raw /data/set2)
refused "RAW: no volume" "$mount:/raw" build "${data[@]}" -- "${run[@]}"
refused "RAW: an empty volume" "$asks" build --volume "$empty:/raw" "${data[@]}" -- "${run[@]}"
refused "DATASET: no volume" "$mount:/data" build "${from[@]}" -- "${run[@]}"
refused "DATASET: a read-only volume" "without :ro" build "${from[@]}" --volume "$shards:/data:ro" -- "${run[@]}"
refused "DATASET: another user's volume" "--user 4242:4242" build "${from[@]}" --volume "$other:/data" -- "${run[@]}"

wheels="torch's CPU wheels ($torch)"
[ "$cuda" = None ] || wheels="torch's CUDA build ($torch), without a GPU"
say "proved: both targets build and run as user 1000 with $wheels"
say "not proved: a Docker engine, the official base image, compose, the NVIDIA runtime, anything on a GPU"
say "$checks checks in $((SECONDS - began)) s"
