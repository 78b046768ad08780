#!/bin/sh
# Rebuilds every kernel. Needs `pip install ziglang==0.17.*`.
set -eu
cd "$(dirname "$0")"
for source in *.c; do
    python3 -m ziglang cc -target wasm32-wasi -mcpu=generic+bulk_memory -O2 -s -o "${source%.c}.wasm" "$source"
done
rm -f ./*.pdb
ls -l ./*.wasm
