#include "bench.h"
static NOINLINE uint32_t fib(uint32_t n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
uint32_t kernel(int scale) {
    uint32_t sum = 0;
    for (int i = 0; i < scale; i++) sum += fib(27 + (i & 1));
    return sum;
}
