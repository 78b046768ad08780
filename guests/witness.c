// Writes numbered lines "N EPOCH" to standard output, and to file argv[1] too
// ("-" for none), argv[3] microseconds apart (argv[4] of them; for ever
// without); keeps argv[2] MiB of memory that it changes and checks all the time,
// and exits with 3 when any of it is wrong.
#include "evenkeel.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { WORDS = 512, CHANGED = 16, CHECKED = 64, ALL_EVERY = 256 };

static uint64_t (*pages)[WORDS];
static uint32_t *generation, count;
static uint64_t state = 88172645463325252ull;

static uint32_t some_page(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state % count);
}

static uint64_t expected(uint32_t page, uint32_t word) {
    return ((uint64_t)page << 40 | (uint64_t)generation[page] << 12 | word) * 0x9e3779b97f4a7c15ull;
}

static void fill(uint32_t page) {
    for (uint32_t word = 0; word < WORDS; word++) pages[page][word] = expected(page, word);
}

static void check(uint32_t page, uint64_t line) {
    for (uint32_t word = 0; word < WORDS; word++) {
        if (pages[page][word] != expected(page, word)) {
            fprintf(stderr, "word %u of page %u is wrong in line %llu\n", word, page,
                    (unsigned long long)line);
            exit(3);
        }
    }
}

static void put(int file, const char *text, int length) {
    if (write(file, text, (size_t)length) != length) {
        perror("witness");
        exit(4);
    }
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "-";
    count = (uint32_t)(argc > 2 ? strtoul(argv[2], 0, 10) : 1) * 256;
    unsigned pause_us = argc > 3 ? (unsigned)strtoul(argv[3], 0, 10) : 1000;
    uint64_t lines = argc > 4 ? strtoull(argv[4], 0, 10) : UINT64_MAX;
    int file = path[0] == '-' ? -1 : open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (path[0] != '-' && file < 0) {
        perror(path);
        return 4;
    }
    pages = malloc((size_t)count * sizeof *pages);
    generation = calloc(count, sizeof *generation);
    if (!pages || !generation) return 5;
    for (uint32_t page = 0; page < count; page++) fill(page);
    for (uint64_t line = 0; line < lines; line++) {
        for (int i = 0; i < CHANGED; i++) {
            uint32_t page = some_page();
            check(page, line);
            generation[page]++;
            fill(page);
        }
        for (int i = 0; i < CHECKED; i++) check(some_page(), line);
        if (line % ALL_EVERY == 0) {
            for (uint32_t page = 0; page < count; page++) check(page, line);
        }
        char text[64];
        int length = snprintf(text, sizeof text, "%llu %llu\n", (unsigned long long)line,
                              (unsigned long long)ek_epoch());
        if (file >= 0) put(file, text, length);
        put(STDOUT_FILENO, text, length);
        if (pause_us) usleep(pause_us);
    }
    return 0;
}
