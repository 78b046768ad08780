// argv[1] workers, argv[2] rows and columns, argv[3] iterations, argv[4] times: relaxes a
// grid by red-black Gauss-Seidel, each worker a band of rows; prints the largest change of
// some iterations, and a hash of the grid in the end. A point's new value is made of points
// of the other colour, and a largest value does not depend on an order: so neither does the
// output on the number of workers. Bands share pages; whoever sees a neighbour's row, the
// largest change or a barrier's count as it was before prints something else, or exits
// with 3.
#include "pthread.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS_MAX = 64, SIZE_MAX_ROWS = 2048, REPORTS = 8 };

static int workers, n, iterations, times;
static double *grid;
static double largest;
static pthread_mutex_t largest_lock = PTHREAD_MUTEX_INITIALIZER;
// What each worker took for the largest change of an iteration.
static double taken[WORKERS_MAX];
static int rounds[WORKERS_MAX];

// A barrier of a mutex and a condition variable, as programs have their own.
static struct {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int count, cycle;
} barrier = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0};

static void meet(void) {
    pthread_mutex_lock(&barrier.lock);
    int cycle = barrier.cycle;
    if (++barrier.count == workers) {
        barrier.count = 0;
        barrier.cycle = !cycle;
        pthread_cond_broadcast(&barrier.turn);
    } else {
        while (cycle == barrier.cycle) pthread_cond_wait(&barrier.turn, &barrier.lock);
    }
    pthread_mutex_unlock(&barrier.lock);
}

static double relax(int first, int end, int colour) {
    double most = 0;
    for (int i = first; i < end; i++) {
        double *row = grid + (size_t)i * n;
        for (int j = 1 + ((i + colour) & 1); j < n - 1; j += 2) {
            double next = 0.25 * (row[j - n] + row[j + n] + row[j - 1] + row[j + 1]);
            double change = next > row[j] ? next - row[j] : row[j] - next;
            if (change > most) most = change;
            row[j] = next;
        }
    }
    return most;
}

static void report(int time, int iteration) {
    uint64_t bits;
    memcpy(&bits, &largest, sizeof bits);
    printf("%d %d %016" PRIx64 "\n", time, iteration, bits);
}

static void *worker(void *arg) {
    int self = (int)(intptr_t)arg, inner = n - 2;
    int first = 1 + (int)((int64_t)inner * self / workers);
    int end = 1 + (int)((int64_t)inner * (self + 1) / workers);
    int every = iterations < REPORTS ? 1 : iterations / REPORTS;
    for (int time = 0; time < times; time++) {
        for (int i = self ? first : 0; i < (self == workers - 1 ? n : end); i++)
            for (int j = 0; j < n; j++) grid[(size_t)i * n + j] = (i * 7 + j * 3 + time) % 101 / 4.0;
        meet();
        for (int iteration = 0; iteration < iterations; iteration++) {
            double most = relax(first, end, 0);
            meet();
            double other = relax(first, end, 1);
            if (other > most) most = other;
            pthread_mutex_lock(&largest_lock);
            if (most > largest) largest = most;
            pthread_mutex_unlock(&largest_lock);
            meet();
            taken[self] = largest;
            rounds[self] = time * iterations + iteration;
            if (self == 0 && iteration % every == 0) report(time, iteration);
            meet();
            for (int i = 0; i < workers; i++)
                if (taken[i] != taken[self] || rounds[i] != rounds[self]) {
                    fprintf(stderr, "worker %d: %d has %a in round %d, not %a in %d\n", self, i,
                            taken[i], rounds[i], taken[self], rounds[self]);
                    exit(3);
                }
            if (self == 0) largest = 0;
            meet();
        }
        if (self == 0) {
            uint64_t hash = 0xcbf29ce484222325ull, bits;
            for (size_t i = 0; i < (size_t)n * n; i++) {
                memcpy(&bits, &grid[i], sizeof bits);
                hash = (hash ^ bits ^ bits >> 32) * 0x100000001b3ull;
            }
            printf("%d %016" PRIx64 "\n", time, hash);
            fflush(stdout);
        }
        meet();
    }
    return 0;
}

int main(int argc, char **argv) {
    workers = argc > 1 ? atoi(argv[1]) : 4;
    n = argc > 2 ? atoi(argv[2]) : 130;
    iterations = argc > 3 ? atoi(argv[3]) : 50;
    times = argc > 4 ? atoi(argv[4]) : 1;
    if (workers < 1 || workers > WORKERS_MAX || n < 3 || n > SIZE_MAX_ROWS || iterations < 1 || times < 1)
        return 2;
    grid = shared_malloc((size_t)n * n * sizeof *grid);
    if (!grid) return 4;
    pthread_t threads[WORKERS_MAX];
    // The main thread is the first worker: it alone prints.
    for (int i = 1; i < workers; i++) {
        int error = pthread_create(&threads[i], 0, worker, (void *)(intptr_t)i);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    worker(0);
    for (int i = 1; i < workers; i++) pthread_join(threads[i], 0);
    return 0;
}
