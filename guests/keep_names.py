"""Removes a module's debug sections but keeps its names: `keep_names.py M.wasm`."""

import sys


def number(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


path = sys.argv[1]
data = open(path, "rb").read()
out, at = data[:8], 8
while at < len(data):
    size, body = number(data, at + 1)
    end = body + size
    length, name = number(data, body)
    if data[at] != 0 or data[name : name + length] == b"name":
        out += data[at:end]
    at = end
open(path, "wb").write(out)
