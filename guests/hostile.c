// Misbehaves as argv[1] says.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile int zero;

__attribute__((noinline)) int divide(int by) { return 1000 / by; }
__attribute__((noinline)) int outer(int by) { return divide(by) + 1; }
__attribute__((noinline)) int recurse(int depth) { volatile int here[4] = {depth}; return recurse(depth + 1) + here[0]; }

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "";
    int number = argc > 2 ? atoi(argv[2]) : 0;
    if (!strcmp(how, "exit")) return number;
    if (!strcmp(how, "abort")) abort();
    if (!strcmp(how, "divide")) return outer(zero);
    if (!strcmp(how, "wild")) return *(volatile int *)(uintptr_t)0xfffffff0u;
    if (!strcmp(how, "recurse")) return recurse(0);
    if (!strcmp(how, "call")) return ((int (*)(double))(uintptr_t)main)(1.0);
    if (!strcmp(how, "spin")) for (;;) zero++, zero--;
    if (!strcmp(how, "allocate")) {
        // Until there is no more; says how much it got.
        for (long mib = 0;; mib++) {
            volatile char *block = malloc(1 << 20);
            if (!block) {
                printf("%ld MiB\n", mib);
                return 0;
            }
            block[0] = 1;
        }
    }
    if (!strcmp(how, "flood")) {
        static char line[8192];
        memset(line, 'x', sizeof line);
        for (;;)
            if (write(1, line, sizeof line) < 0) return 5;
    }
    if (!strcmp(how, "descriptors")) {
        for (int count = 0;; count++)
            if (open("/", O_RDONLY | O_DIRECTORY) < 0) {
                int error = errno;
                printf("%d %s\n", count, strerror(error));
                return error == EMFILE ? 0 : 6;
            }
    }
    if (!strcmp(how, "open")) {
        // Of each path: what came of opening it.
        for (int i = 2; i < argc; i++) {
            int fd = open(argv[i], O_RDONLY);
            printf("%s: %s\n", argv[i], fd < 0 ? strerror(errno) : "opened");
        }
        return 0;
    }
    if (!strcmp(how, "write")) {
        int fd = open(argv[2], O_CREAT | O_WRONLY, 0600);
        printf("%s: %s\n", argv[2], fd < 0 ? strerror(errno) : "opened");
        return 0;
    }
    if (!strcmp(how, "stdin")) {
        char buffer[256];
        long total = 0;
        for (ssize_t count; (count = read(0, buffer, sizeof buffer)) > 0;) total += count;
        printf("%ld bytes\n", total);
        return 0;
    }
    return 100;
}
