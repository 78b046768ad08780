// What a program that knows Evenkeel may ask it. Programs that do not know it
// work unchanged.
#ifndef EVENKEEL_H
#define EVENKEEL_H

#include <stdint.h>

// The epoch under which the machine runs: a number that rises whenever the
// machine gets another owner (a move, a restart) and never falls. Give it to
// whoever you write to, and let them refuse lower ones than they have seen: a
// fencing token. 0 outside of a cluster (`keel wasm`).
__attribute__((import_module("evenkeel"), import_name("epoch")))
uint64_t ek_epoch(void);

#endif
