#!/usr/bin/env bash
# Builds guests/*.wasm (or the ones named) from their sources, into $OUT or
# here. `cargo xtask guests` calls it and writes MANIFEST.
set -euo pipefail
cd "$(dirname "$0")"
OUT="$(realpath "${OUT:-.}")"
export OUT

zig=(python3 -m ziglang cc -target wasm32-wasi -s)
threaded() { # GUEST LEVEL MEMORY_MAX
    "${zig[@]}" "$2" "$1.c" -mcpu=generic+atomics+bulk_memory -Ishim \
        -Wl,--shared-memory,--import-memory,--export-memory,--max-memory="$3" \
        shim/pthread.c shim/start.S -o "$OUT/$1.wasm"
}

build() {
    case "$1" in
        threads | pipeline | stencil | store) threaded "$1" -Os $((256 << 20)) ;;
        ep) threaded "$1" -O2 $((256 << 20)) ;;
        matrix | render) threaded "$1" -O2 $((1 << 30)) ;;
        mapreduce) threaded "$1" -O2 $((3 << 30)) ;;
        zstd) ./zstd/build.sh ;;
        hostile)
            # With names: the tests read a backtrace.
            python3 -m ziglang cc -target wasm32-wasi -O1 -g -Wno-everything \
                -ffile-prefix-map="$PWD"=. hostile.c -o "$OUT/hostile.wasm"
            python3 keep_names.py "$OUT/hostile.wasm"
            ;;
        *) "${zig[@]}" -Os "$1.c" -o "$OUT/$1.wasm" ;;
    esac
    chmod 644 "$OUT/$1.wasm"
    echo "built $1.wasm ($(stat -c %s "$OUT/$1.wasm") bytes)"
}

if [ $# -eq 0 ]; then set -- counter disk echo ep files hostile hot ledger mapreduce matrix pipeline render spinner stamp stencil store threads witness writer zstd; fi
for guest in "$@"; do build "$guest"; done
