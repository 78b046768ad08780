// Writes, renames, removes and reads back files under argv[1]; argv[2] rounds.
// Two descriptors stay open all the time: of a file that was renamed, and of
// one that was removed. Exits with 3 when something is not as it must be.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[256];

static char *at(const char *name, int number) {
    static char path[2][512];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof path[turn], "%s/%s%d", root, name, number);
    return path[turn];
}

static void must(int holds, const char *what, int round) {
    if (holds) return;
    printf("round %d: %s: %s\n", round, what, strerror(errno));
    exit(3);
}

int main(int argc, char **argv) {
    snprintf(root, sizeof root, "%s", argc > 1 ? argv[1] : ".");
    int rounds = argc > 2 ? atoi(argv[2]) : 10;
    int renamed = open(at("log", 0), O_CREAT | O_EXCL | O_RDWR, 0600);
    must(renamed >= 0, "create log", -1);
    int removed = open(at("gone", 0), O_CREAT | O_EXCL | O_RDWR, 0600);
    must(removed >= 0, "create gone", -1);
    must(unlink(at("gone", 0)) == 0, "remove gone", -1);
    uint32_t sum = 2166136261u;
    for (int round = 0; round < rounds; round++) {
        char line[64], back[64];
        int count = snprintf(line, sizeof line, "round %d\n", round);
        must(write(renamed, line, (size_t)count) == count, "write log", round);
        must(write(removed, line, (size_t)count) == count, "write gone", round);
        must(rename(at("log", round), at("log", round + 1)) == 0, "rename log", round);
        must(mkdir(at("dir", round), 0700) == 0, "mkdir", round);
        char inner[512];
        snprintf(inner, sizeof inner, "%s/inner", at("dir", round));
        FILE *file = fopen(inner, "w+");
        must(file != 0, "create inner", round);
        for (int i = 0; i < 100; i++) fprintf(file, "%d %d\n", round, i);
        must(fseek(file, 0, SEEK_SET) == 0, "seek", round);
        while (fgets(back, sizeof back, file))
            for (char *c = back; *c; c++) sum = (sum ^ (uint8_t)*c) * 16777619u;
        fclose(file);
        DIR *dir = opendir(at("dir", round));
        must(dir != 0, "opendir", round);
        int entries = 0;
        for (struct dirent *entry; (entry = readdir(dir));) entries += entry->d_name[0] != '.';
        closedir(dir);
        must(entries == 1, "one entry", round);
        must(unlink(inner) == 0, "remove inner", round);
        must(rmdir(at("dir", round)) == 0, "rmdir", round);
        printf("%d %08x\n", round, sum);
        fflush(stdout);
    }
    off_t lengths[2];
    int fds[2] = {renamed, removed};
    for (int i = 0; i < 2; i++) {
        char back[64];
        lengths[i] = lseek(fds[i], 0, SEEK_CUR);
        must(lseek(fds[i], 0, SEEK_SET) == 0, "rewind", rounds);
        must(read(fds[i], back, 8) == 8 && !memcmp(back, "round 0\n", 8), "read back", rounds);
    }
    must(lengths[0] == lengths[1], "lengths", rounds);
    close(renamed);
    close(removed);
    must(unlink(at("log", rounds)) == 0, "remove log", rounds);
    printf("%lld bytes in each, sum %08x\n", (long long)lengths[0], sum);
    return 0;
}
