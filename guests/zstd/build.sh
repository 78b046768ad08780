#!/usr/bin/env bash
# Builds ../zstd.wasm: zstd 1.5.7, multi-threaded, from the sources that the
# crate zstd-sys carries, with the pthreads of ../shim.
set -euo pipefail
cd "$(dirname "$0")"

fetch="$(mktemp -d)"
trap 'rm -rf "$fetch"' EXIT
mkdir "$fetch/src"
touch "$fetch/src/lib.rs"
cat > "$fetch/Cargo.toml" <<TOML
[package]
name = "sources"
version = "0.0.0"
edition = "2021"
[dependencies]
zstd-sys = "=2.0.16"
TOML
sources="$(cargo metadata --quiet --format-version 1 --manifest-path "$fetch/Cargo.toml" |
    python3 -c 'import json,os,sys; print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "zstd-sys"))')/zstd/lib"

# Small rather than complete: the strategies up to level 12, one decoder.
small=(-Oz -DHUF_FORCE_DECOMPRESS_X1 -DZSTD_FORCE_DECOMPRESS_SEQUENCES_SHORT -DZSTD_NO_INLINE=1
    -DZSTD_STRIP_ERROR_STRINGS=1 -DZSTD_EXCLUDE_BTLAZY2_BLOCK_COMPRESSOR
    -DZSTD_EXCLUDE_BTOPT_BLOCK_COMPRESSOR -DZSTD_EXCLUDE_BTULTRA_BLOCK_COMPRESSOR)
files=("$sources"/common/*.c "$sources"/compress/*.c "$sources"/decompress/*.c)
python3 -m ziglang cc -target wasm32-wasi -mcpu=generic+atomics+bulk_memory "${small[@]}" -s \
    -DZSTD_MULTITHREAD -DZSTD_DISABLE_ASM -DZSTD_LEGACY_SUPPORT=0 -DZSTD_NO_TRACE \
    -I../shim -I"$sources" -ffile-prefix-map="$sources"=zstd \
    -Wl,--shared-memory,--import-memory,--export-memory,--max-memory=536870912 \
    main.c ../shim/pthread.c ../shim/start.S "${files[@]}" -o "${OUT:-..}/zstd.wasm"
