#include "bench.h"
typedef uint32_t (*Op)(uint32_t, uint32_t);
static NOINLINE uint32_t add(uint32_t a, uint32_t b) { return a + b; }
static NOINLINE uint32_t sub(uint32_t a, uint32_t b) { return a - b; }
static NOINLINE uint32_t mix(uint32_t a, uint32_t b) { return (a ^ b) * 2654435761u; }
static NOINLINE uint32_t turn(uint32_t a, uint32_t b) { return a << (b & 7) | a >> (25 - (b & 7)); }
static Op volatile ops_source[4] = {add, sub, mix, turn};
uint32_t kernel(int scale) {
    Op ops[4];
    for (int i = 0; i < 4; i++) ops[i] = ops_source[i];
    uint32_t x = 1;
    for (int n = 0; n < scale * 1500000; n++) x = ops[(n ^ (n >> 3)) & 3](x, n);
    return x;
}
