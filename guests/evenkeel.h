// What a program that knows Evenkeel may ask it. Programs that do not know it
// work unchanged.
#ifndef EVENKEEL_H
#define EVENKEEL_H

#include <stddef.h>
#include <stdint.h>

// The epoch under which the machine runs: a number that rises whenever the
// machine gets another owner (a move, a restart) and never falls. Give it to
// whoever you write to, and let them refuse lower ones than they have seen: a
// fencing token. 0 outside of a cluster (`keel wasm`).
__attribute__((import_module("evenkeel"), import_name("epoch")))
uint64_t ek_epoch(void);

// Calls a piece of this program's memory by a name: `keel objects M` lists it, and
// `keel move M/objects/NAME --to NODE` moves it. The same name again gives it to another
// piece; 0 bytes take it away. Names are letters, digits, `.`, `_` and `-`, at most 64, a
// letter or `_` first; there are at most 4096. Whole pages of 4 KiB move: objects that
// share one move together, so align what is to be apart. Objects may lie in others; of
// pages that very many have only the innermost eight are told.
// Returns 0, or an errno of WASI: EINVAL for what is no name, EFAULT for what is not in
// memory, ENOMEM for too many names. Has no other effect, and none at all outside of a
// cluster.
__attribute__((import_module("evenkeel"), import_name("object")))
int ek_object_named(const char *name, size_t length, const void *start, size_t bytes);

// The calling thread likes to be on the node that has most of an object: it is moved there
// when that node has a core for it, and stays longer than others. An empty name: nowhere.
// Returns 0, or ENOENT if nothing has that name.
__attribute__((import_module("evenkeel"), import_name("prefer")))
int ek_prefer_named(const char *name, size_t length);

static inline int ek_object(const char *name, const void *start, size_t bytes) {
    return ek_object_named(name, __builtin_strlen(name), start, bytes);
}

static inline int ek_prefer(const char *name) {
    return ek_prefer_named(name, __builtin_strlen(name));
}

#endif
