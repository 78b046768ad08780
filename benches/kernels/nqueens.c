#include "bench.h"
static NOINLINE uint32_t place(uint32_t all, uint32_t cols, uint32_t left, uint32_t right) {
    if (cols == all) return 1;
    uint32_t found = 0;
    for (uint32_t free = all & ~(cols | left | right); free;) {
        uint32_t bit = free & -free;
        free ^= bit;
        found += place(all, cols | bit, (left | bit) << 1, (right | bit) >> 1);
    }
    return found;
}
uint32_t kernel(int scale) {
    uint32_t sum = 0;
    volatile int size = 9;
    for (int n = 0; n < scale; n++) sum += place((1 << size) - 1, 0, 0, 0) + n;
    return sum;
}
