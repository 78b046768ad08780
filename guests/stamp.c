// Prints numbered lines with the time at which they were printed, "LINE MICROSECONDS" (since 1970),
// for ever: argv[1] microseconds apart, each after writing to argv[2] KiB of its argv[3] MiB, in turn.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

int main(int argc, char **argv) {
    unsigned pause_us = argc > 1 ? (unsigned)strtoul(argv[1], 0, 10) : 1000;
    uint64_t pages_each = (argc > 2 ? strtoull(argv[2], 0, 10) : 64) * 1024 / PAGE;
    uint64_t pages = (argc > 3 ? strtoull(argv[3], 0, 10) : 64) << 8;
    volatile uint64_t *memory = calloc(pages, PAGE);
    if (!memory || !pages) return 2;
    uint64_t at = 0;
    for (uint64_t line = 0;; line++) {
        for (uint64_t n = 0; n < pages_each; n++) {
            memory[at * (PAGE / 8)] = line + 1;
            at = (at + 1) % pages;
        }
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        printf("%llu %llu\n", (unsigned long long)line,
               (unsigned long long)now.tv_sec * 1000000 + (unsigned long long)now.tv_nsec / 1000);
        fflush(stdout);
        if (pause_us) usleep(pause_us);
    }
}
