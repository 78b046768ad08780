// argv[1] workers and argv[2] units of work: a queue behind a mutex with two
// condition variables, a barrier between the rounds, a contended counter. The
// result does not depend on the order in which threads run.
#include "pthread.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORKERS_MAX = 64, QUEUE = 16, ROUNDS = 4 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t filled = PTHREAD_COND_INITIALIZER, emptied = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static uint64_t queue[QUEUE];
static int head, length, closed;
static uint64_t sums[WORKERS_MAX], total;
static _Atomic uint64_t counter;
static _Atomic int failed, serial;
static _Thread_local uint64_t mine = 17;
static int workers;
static uint64_t units;

static uint64_t work(uint64_t unit) {
    uint64_t x = unit + 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < 2000; i++) {
        x ^= x >> 12; x ^= x << 25; x ^= x >> 27;
        x *= 0x2545f4914f6cdd1dull;
    }
    return x;
}

static int take(uint64_t *unit) {
    pthread_mutex_lock(&lock);
    while (length == 0 && !closed) pthread_cond_wait(&filled, &lock);
    int got = length > 0;
    if (got) {
        *unit = queue[head];
        head = (head + 1) % QUEUE;
        length--;
        pthread_cond_signal(&emptied);
    }
    pthread_mutex_unlock(&lock);
    return got;
}

static void *worker(void *arg) {
    int self = (int)(intptr_t)arg;
    uint64_t unit;
    while (take(&unit)) {
        sums[self] ^= work(unit);
        mine++;
        atomic_fetch_add(&counter, 1);
    }
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&barrier);
        // Between two barriers nobody changes what the others read. Folded, the
        // sums are the same however the units were dealt out.
        uint64_t all = 1, folded = 0;
        for (int i = 0; i < workers; i++) {
            all += sums[i];
            folded ^= sums[i];
        }
        if (round == 0 && self == 0) total = folded;
        if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD) atomic_fetch_add(&serial, 1);
        sums[self] = all;
    }
    if (mine < 17 || sums[self] == 0) atomic_store(&failed, 1);
    return (void *)(uintptr_t)(mine - 17);
}

int main(int argc, char **argv) {
    workers = argc > 1 ? atoi(argv[1]) : 4;
    units = argc > 2 ? strtoull(argv[2], 0, 10) : 2000;
    if (workers < 1 || workers > WORKERS_MAX) return 2;
    pthread_barrier_init(&barrier, 0, (unsigned)workers);
    pthread_t threads[WORKERS_MAX];
    for (int i = 0; i < workers; i++) {
        int error = pthread_create(&threads[i], 0, worker, (void *)(intptr_t)i);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    for (uint64_t unit = 0; unit < units; unit++) {
        pthread_mutex_lock(&lock);
        while (length == QUEUE) pthread_cond_wait(&emptied, &lock);
        queue[(head + length) % QUEUE] = unit;
        length++;
        pthread_cond_signal(&filled);
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_lock(&lock);
    closed = 1;
    pthread_cond_broadcast(&filled);
    pthread_mutex_unlock(&lock);
    uint64_t done = 0;
    for (int i = 0; i < workers; i++) {
        void *count;
        pthread_join(threads[i], &count);
        done += (uintptr_t)count;
    }
    printf("%d workers, %" PRIu64 " units, result %016" PRIx64 "\n", workers, done, total);
    return failed || serial != ROUNDS || done != units || atomic_load(&counter) != units ? 3 : 0;
}
