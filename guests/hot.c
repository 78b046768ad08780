// A hot loop: touches argv[1] MiB once, then writes a word in each page of the
// first argv[2] MiB of it, over and over, as fast as it can; after each MiB it
// prints a line with its number and the MiB written so far if half a millisecond is
// over since the last, argv[3] of them (for ever without).
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MIB = 256, TICK_NS = 500000 };

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv) {
    uint64_t pages = (argc > 1 ? strtoull(argv[1], 0, 10) : 256) << 8;
    uint64_t hot = (argc > 2 ? strtoull(argv[2], 0, 10) : 64) << 8;
    uint64_t lines = argc > 3 ? strtoull(argv[3], 0, 10) : 0;
    if (!pages || hot > pages) return 2;
    volatile uint64_t(*memory)[WORDS] = aligned_alloc(PAGE, pages * PAGE);
    if (!memory) return 2;
    for (uint64_t page = 0; page < pages; page++) memory[page][0] = page + 1;
    uint64_t ticked = 0, passes = 0, written = 0;
    for (uint64_t line = 0; lines == 0 || line < lines;) {
        for (uint64_t page = 0; page < hot; page++) {
            memory[page][0]++;
            if (page % MIB) continue;
            written++;
            uint64_t now = now_ns();
            if (now - ticked < TICK_NS) continue;
            ticked = now;
            printf("%llu %llu\n", (unsigned long long)line++, (unsigned long long)written);
            fflush(stdout);
        }
        passes++;
        // All were written equally often, or memory was lost.
        uint64_t page = passes * 7919 % hot;
        if (memory[page][0] != page + 1 + passes) {
            printf("page %llu is wrong in pass %llu\n", (unsigned long long)page, (unsigned long long)passes);
            return 3;
        }
    }
    return 0;
}
