// Dirties memory: argv[1] MiB, at most argv[2] MB a second; prints a numbered line every
// 100 ms, argv[3] of them (for ever without). Each page carries the number of
// its last write twice and its own place; what is read back must match, or it
// exits with 3.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv) {
    uint64_t mib = argc > 1 ? strtoull(argv[1], 0, 10) : 64;
    uint64_t rate = (argc > 2 ? strtoull(argv[2], 0, 10) : 200) * 1000000;
    uint64_t lines = argc > 3 ? strtoull(argv[3], 0, 10) : 0;
    uint64_t pages = mib << 8;
    // Aligned, or each write would touch two pages of the host.
    uint64_t (*memory)[WORDS] = aligned_alloc(PAGE, pages * PAGE);
    if (!memory || !pages) {
        fprintf(stderr, "no %llu MiB\n", (unsigned long long)mib);
        return 2;
    }
    for (uint64_t page = 0; page < pages; page++)
        for (uint64_t word = 0; word < WORDS; word++) memory[page][word] = page ^ word << 32;
    uint64_t *writes = calloc(pages, sizeof *writes);
    if (!writes) return 2;
    uint64_t next = 0, written = 0, begun = now_ns();
    for (uint64_t line = 0; lines == 0 || line < lines; line++) {
        uint64_t due = begun + (line + 1) * 100000000;
        for (;;) {
            uint64_t now = now_ns();
            if (now >= due) break;
            uint64_t wanted = (uint64_t)((double)(now - begun) / 1e9 * (double)rate);
            // Time that it did not run is not made up for, or it would write
            // faster than it was told.
            if (wanted > written + rate / 50) written = wanted - rate / 50;
            if (written >= wanted) {
                usleep(500);
                continue;
            }
            for (uint64_t burst = 0; burst < 64; burst++) {
                uint64_t page = next;
                next = (next + 7919) % pages;
                uint64_t *at = memory[page];
                if (at[0] != (page ^ writes[page]) || at[WORDS - 1] != (page ^ (uint64_t)(WORDS - 1) << 32 ^ writes[page])) {
                    printf("page %llu is wrong in line %llu\n", (unsigned long long)page, (unsigned long long)line);
                    return 3;
                }
                writes[page]++;
                for (uint64_t word = 0; word < WORDS; word++) at[word] = page ^ word << 32 ^ writes[page];
                written += PAGE;
            }
        }
        printf("%llu\n", (unsigned long long)line);
        fflush(stdout);
    }
    return 0;
}
