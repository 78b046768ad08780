// Serves argv[1] connections (one at a time) of a listening socket that it was
// given as descriptor 3: sends back each byte, and says how many.
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

__attribute__((import_module("wasi_snapshot_preview1"), import_name("sock_accept")))
int32_t sock_accept(int32_t fd, int32_t flags, int32_t *connection);

int main(int argc, char **argv) {
    int connections = argc > 1 ? atoi(argv[1]) : 1;
    for (int i = 0; i < connections; i++) {
        int32_t fd;
        int32_t error = sock_accept(3, 0, &fd);
        if (error) {
            fprintf(stderr, "accept: errno %d\n", error);
            return 3;
        }
        char buffer[4096];
        long total = 0;
        for (ssize_t count; (count = read(fd, buffer, sizeof buffer)) > 0;) {
            for (ssize_t sent = 0; sent < count;) {
                ssize_t more = write(fd, buffer + sent, (size_t)(count - sent));
                if (more < 0) return 4;
                sent += more;
            }
            total += count;
        }
        close(fd);
        printf("%ld bytes\n", total);
        fflush(stdout);
    }
    return 0;
}
