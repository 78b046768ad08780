// Burns CPU: argv[1] steps (for ever without) of argv[2] rounds of a mixing
// function over a table; prints the step and its checksum after each.
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t table[4096];

static uint64_t mix(uint64_t x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

int main(int argc, char **argv) {
    uint64_t steps = argc > 1 ? strtoull(argv[1], 0, 10) : 0;
    uint64_t rounds = argc > 2 ? strtoull(argv[2], 0, 10) : 50000000;
    uint64_t sum = 1;
    double wave = 0.5;
    for (uint64_t step = 0; steps == 0 || step < steps; step++) {
        for (uint64_t i = 0; i < rounds; i++) {
            uint64_t *slot = &table[sum & 4095];
            sum = mix(sum + i + *slot);
            *slot ^= sum;
            wave = 3.9 * wave * (1.0 - wave);
        }
        printf("%" PRIu64 " %016" PRIx64 " %.17g\n", step, sum, wave);
        fflush(stdout);
    }
    return 0;
}
