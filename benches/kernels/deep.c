// Spins for ever at the bottom of forty activations: what a capture costs when
// there is a stack to save.
#define BENCH_NO_MAIN
#include "bench.h"
static volatile uint32_t cell;
static NOINLINE uint32_t down(uint32_t depth, uint32_t x, double y, uint64_t z) {
    if (depth == 0) {
        for (uint32_t i = 0;; i++) { cell = x ^= i * 2654435761u; if (x == 1 && i > 4000000000u) return x; }
    }
    uint32_t below = down(depth - 1, cell + x + depth, y * 1.25, z ^ depth);
    return (below * 31 ^ x) + (uint32_t)y + (uint32_t)z;
}
int main(int argc, char **argv) { return down(argc > 1 ? atoi(argv[1]) : 40, 7, 1.5, 9); }
