// Keeps argv[2] MiB of pages under argv[1] that outlive it: argv[3] rounds (for
// ever with 0), with argv[4] ms between them. Each round writes pages, then its
// number, and syncs; only then it prints the number. Begun anew, it checks all
// that it finds against what the rounds so far must have left, the round that was
// under way included, and prints "found N". Exits with 3 when something is not as
// it must be, with 4 when the disk is full.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, BATCH = 8 };

static char root[256], name[512], new[512];
static uint64_t *stamps, pages;
static uint64_t page_bytes[WORDS], back[WORDS];

static void must(int holds, const char *what, uint64_t round) {
    if (holds) return;
    int why = errno;
    printf("round %llu: %s: %s\n", (unsigned long long)round, what, strerror(why));
    exit(why == ENOSPC ? 4 : 3);
}

// The page that a round writes as its i-th.
static uint64_t choice(uint64_t round, uint64_t i) {
    uint64_t x = round * BATCH + i + 1;
    x ^= x >> 30, x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27, x *= 0x94d049bb133111ebu;
    return (x ^ x >> 31) % pages;
}

static void fill(uint64_t page, uint64_t stamp) {
    for (uint64_t word = 0; word < WORDS; word++)
        page_bytes[word] = stamp ? stamp ^ page << 20 ^ word << 48 : 0;
}

static void write_page(int fd, uint64_t page, uint64_t round) {
    stamps[page] = round;
    fill(page, round);
    const char *from = (const char *)page_bytes;
    for (size_t done = 0; done < PAGE;) {
        ssize_t count = pwrite(fd, from + done, PAGE - done, (off_t)(page * PAGE + done));
        must(count > 0, "write", round);
        done += (size_t)count;
    }
}

static int is(int fd, uint64_t page, uint64_t stamp) {
    memset(back, 0, PAGE);
    must(pread(fd, back, PAGE, (off_t)(page * PAGE)) >= 0, "read", stamp);
    fill(page, stamp);
    return !memcmp(back, page_bytes, PAGE);
}

// The last round that was finished, all of it checked.
static uint64_t find(int fd) {
    char line[64] = {0};
    int file = open(name, O_RDONLY);
    if (file < 0) return 0;
    must(read(file, line, sizeof line - 1) > 0, "read round", 0);
    close(file);
    uint64_t last = strtoull(line, 0, 10);
    for (uint64_t round = 1; round <= last; round++)
        for (uint64_t i = 0; i < BATCH; i++) stamps[choice(round, i)] = round;
    // Of the one that was under way the first ones may be there.
    uint64_t i = 0;
    while (i < BATCH && is(fd, choice(last + 1, i), last + 1)) stamps[choice(last + 1, i++)] = last + 1;
    errno = 0;
    for (uint64_t page = 0; page < pages; page++) must(is(fd, page, stamps[page]), "a page differs", last);
    return last;
}

int main(int argc, char **argv) {
    snprintf(root, sizeof root, "%s", argc > 1 ? argv[1] : ".");
    pages = (argc > 2 ? strtoull(argv[2], 0, 10) : 8) << 8;
    uint64_t rounds = argc > 3 ? strtoull(argv[3], 0, 10) : 0;
    useconds_t pause = (useconds_t)(argc > 4 ? strtoull(argv[4], 0, 10) : 0) * 1000;
    stamps = calloc(pages, sizeof *stamps);
    snprintf(name, sizeof name, "%s/pages", root);
    int fd = open(name, O_CREAT | O_RDWR, 0600);
    must(fd >= 0, "open", 0);
    snprintf(name, sizeof name, "%s/round", root);
    snprintf(new, sizeof new, "%s/round.new", root);
    uint64_t first = find(fd);
    printf("found %llu\n", (unsigned long long)first);
    fflush(stdout);
    for (uint64_t round = first + 1; rounds == 0 || round <= first + rounds; round++) {
        for (uint64_t i = 0; i < BATCH; i++) write_page(fd, choice(round, i), round);
        char line[64];
        int count = snprintf(line, sizeof line, "%llu\n", (unsigned long long)round);
        int file = open(new, O_CREAT | O_TRUNC | O_RDWR, 0600);
        must(file >= 0 && write(file, line, (size_t)count) == count, "write round", round);
        close(file);
        must(rename(new, name) == 0, "rename", round);
        must(fsync(fd) == 0, "fsync", round);
        for (uint64_t i = 0; i < BATCH; i++) {
            uint64_t page = choice(round ^ 1u << 30, i);
            errno = 0;
            must(is(fd, page, stamps[page]), "a page differs", round);
        }
        fputs(line, stdout);
        fflush(stdout);
        if (pause) usleep(pause);
    }
    printf("all of it is as it must be\n");
    return 0;
}
