// argv[1] workers, argv[2] rows and columns, argv[3] times: multiplies two matrices of
// doubles, each worker a band of rows; prints a hash of each product. Each element is
// summed in one order, so it does not depend on the number of workers.
#include "evenkeel.h"
#include "pthread.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS_MAX = 64, BLOCK = 64, PAGE = 4096 };

static int workers, n, times;
static double *a, *b, *c;
static pthread_barrier_t barrier;

// From the beginning of a page on, as what else is shared: bands of whole pages then share
// none. `NULL` if there is no room.
static double *matrix(size_t bytes) {
    char *room = shared_malloc(bytes + PAGE);
    return room ? (double *)(room + (PAGE - (uintptr_t)room % PAGE) % PAGE) : NULL;
}

static void *worker(void *arg) {
    int self = (int)(intptr_t)arg;
    int first = (int)((int64_t)n * self / workers), end = (int)((int64_t)n * (self + 1) / workers);
    for (int time = 0; time < times; time++) {
        for (int i = first; i < end; i++)
            for (int j = 0; j < n; j++) {
                a[(size_t)i * n + j] = (i * 7 + j * 3 + time) % 101 - 50;
                b[(size_t)i * n + j] = (i * 5 + j * 11 + time) % 97 / 8.0;
            }
        memset(c + (size_t)first * n, 0, (size_t)(end - first) * n * sizeof *c);
        pthread_barrier_wait(&barrier);
        for (int kk = 0; kk < n; kk += BLOCK)
            for (int i = first; i < end; i++) {
                double *out = c + (size_t)i * n;
                for (int k = kk; k < n && k < kk + BLOCK; k++) {
                    double x = a[(size_t)i * n + k];
                    const double *in = b + (size_t)k * n;
                    for (int j = 0; j < n; j++) out[j] += x * in[j];
                }
            }
        pthread_barrier_wait(&barrier);
        // (The product is looked at.)
        pthread_barrier_wait(&barrier);
    }
    return 0;
}

int main(int argc, char **argv) {
    workers = argc > 1 ? atoi(argv[1]) : 4;
    n = argc > 2 ? atoi(argv[2]) : 200;
    times = argc > 3 ? atoi(argv[3]) : 1;
    if (workers < 1 || workers > WORKERS_MAX || n < 1 || n > 4096 || times < 1) return 2;
    size_t bytes = (size_t)n * n * sizeof *a;
    a = matrix(bytes), b = matrix(bytes), c = matrix(bytes);
    if (!a || !b || !c) return 4;
    if (ek_object("a", a, bytes) || ek_object("b", b, bytes) || ek_object("c", c, bytes)) return 5;
    pthread_barrier_init(&barrier, 0, (unsigned)workers + 1);
    pthread_t threads[WORKERS_MAX];
    for (int i = 0; i < workers; i++) {
        int error = pthread_create(&threads[i], 0, worker, (void *)(intptr_t)i);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    for (int time = 0; time < times; time++) {
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        uint64_t hash = 0xcbf29ce484222325ull, bits;
        for (size_t i = 0; i < (size_t)n * n; i++) {
            memcpy(&bits, &c[i], sizeof bits);
            hash = (hash ^ bits ^ bits >> 32) * 0x100000001b3ull;
        }
        printf("%d %016" PRIx64 "\n", time, hash);
        fflush(stdout);
        pthread_barrier_wait(&barrier);
    }
    for (int i = 0; i < workers; i++) pthread_join(threads[i], 0);
    return 0;
}
