// Prints numbered lines "0", "1", … for ever, or argv[1] of them, argv[2]
// milliseconds apart; checks a buffer of its own before each and exits with 3
// when a byte of it is wrong.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { WORDS = 64 << 10 };
static uint32_t buffer[WORDS];

static uint32_t expected(uint32_t round, uint32_t at) {
    return (round * 2654435761u) ^ (at * 40503u);
}

int main(int argc, char **argv) {
    uint64_t lines = argc > 1 ? strtoull(argv[1], 0, 10) : 0;
    unsigned pause_ms = argc > 2 ? (unsigned)strtoul(argv[2], 0, 10) : 100;
    uint32_t round = 0;
    for (uint32_t at = 0; at < WORDS; at++) buffer[at] = expected(round, at);
    for (uint64_t line = 0; lines == 0 || line < lines; line++) {
        for (uint32_t at = 0; at < WORDS; at++) {
            if (buffer[at] != expected(round, at)) {
                printf("word %u is wrong in line %llu\n", at, (unsigned long long)line);
                return 3;
            }
        }
        round++;
        for (uint32_t at = 0; at < WORDS; at++) buffer[at] = expected(round, at);
        printf("%llu\n", (unsigned long long)line);
        fflush(stdout);
        if (pause_ms) usleep(pause_ms * 1000);
    }
    return 0;
}
