// Keeps argv[2] MiB in a file under argv[1] and checks it: argv[3] rounds (for
// ever with 0), with argv[4] ms between them. Each page carries its place and
// the number of its last write; after a cut it is zeros. A line per round.
// Exits with 3 when something is not as it must be, with 4 when the disk is
// full.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, BATCH = 16 };

static char root[256];
static uint64_t *stamps, pages, state = 88172645463325252u;
static uint64_t page_bytes[WORDS];

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void must(int holds, const char *what, uint64_t round) {
    if (holds) return;
    int why = errno;
    printf("round %llu: %s: %s\n", (unsigned long long)round, what, strerror(why));
    exit(why == ENOSPC ? 4 : 3);
}

static void fill(uint64_t page) {
    for (uint64_t word = 0; word < WORDS; word++)
        page_bytes[word] = stamps[page] ? stamps[page] ^ page << 20 ^ word << 48 : 0;
}

static void write_page(int fd, uint64_t page, uint64_t round) {
    stamps[page] = round + 1;
    fill(page);
    const char *from = (const char *)page_bytes;
    for (size_t done = 0; done < PAGE;) {
        ssize_t count = pwrite(fd, from + done, PAGE - done, (off_t)(page * PAGE + done));
        must(count > 0, "write", round);
        done += (size_t)count;
    }
}

static void check_page(int fd, uint64_t page, uint64_t round) {
    static uint64_t back[WORDS];
    must(pread(fd, back, PAGE, (off_t)(page * PAGE)) == PAGE, "read", round);
    fill(page);
    errno = 0;
    must(!memcmp(back, page_bytes, PAGE), "a page differs", round);
}

int main(int argc, char **argv) {
    snprintf(root, sizeof root, "%s", argc > 1 ? argv[1] : ".");
    pages = (argc > 2 ? strtoull(argv[2], 0, 10) : 8) << 8;
    uint64_t rounds = argc > 3 ? strtoull(argv[3], 0, 10) : 0;
    useconds_t pause = (useconds_t)(argc > 4 ? strtoull(argv[4], 0, 10) : 0) * 1000;
    stamps = calloc(pages, sizeof *stamps);
    char name[512], new[512];
    snprintf(name, sizeof name, "%s/big", root);
    int big = open(name, O_CREAT | O_EXCL | O_RDWR, 0600);
    must(big >= 0, "create big", 0);
    for (uint64_t page = 0; page < pages; page++) write_page(big, page, 0);
    snprintf(name, sizeof name, "%s/gone", root);
    int gone = open(name, O_CREAT | O_EXCL | O_RDWR, 0600);
    must(gone >= 0 && unlink(name) == 0, "remove gone", 0);
    snprintf(name, sizeof name, "%s/round", root);
    snprintf(new, sizeof new, "%s/round.new", root);
    for (uint64_t round = 1; rounds == 0 || round <= rounds; round++) {
        for (int i = 0; i < BATCH; i++) write_page(big, next() % pages, round);
        for (int i = 0; i < BATCH; i++) check_page(big, next() % pages, round);
        if (round % 32 == 0) {
            uint64_t kept = pages - next() % 64;
            must(ftruncate(big, (off_t)(kept * PAGE)) == 0, "cut", round);
            must(ftruncate(big, (off_t)(pages * PAGE)) == 0, "extend", round);
            for (uint64_t page = kept; page < pages; page++) stamps[page] = 0;
        }
        if (round % 16 == 0) must(fsync(big) == 0, "fsync", round);
        char line[64], back[64] = {0};
        int count = snprintf(line, sizeof line, "%llu\n", (unsigned long long)round);
        int file = open(new, O_CREAT | O_TRUNC | O_RDWR, 0600);
        must(file >= 0 && write(file, line, (size_t)count) == count, "write round", round);
        close(file);
        must(rename(new, name) == 0, "rename", round);
        file = open(name, O_RDONLY);
        must(file >= 0 && read(file, back, sizeof back) == count && !memcmp(line, back, (size_t)count), "read round", round);
        close(file);
        must(pwrite(gone, line, (size_t)count, 0) == count, "write gone", round);
        must(pread(gone, back, sizeof back, 0) >= count && !memcmp(line, back, (size_t)count), "read gone", round);
        fputs(line, stdout);
        fflush(stdout);
        if (pause) usleep(pause);
    }
    for (uint64_t page = 0; page < pages; page++) check_page(big, page, rounds);
    printf("all of it is as it must be\n");
    return 0;
}
