// argv[1] workers, argv[2] M, argv[3] times: the kernel EP of the NAS Parallel Benchmarks
// (report RNR-94-007), written anew: 2^M pairs of uniform deviates, of which those within
// the unit circle become Gaussian ones. Each worker has its share of them beforehand, in
// batches. Prints a line for each run: its number, the sums of both deviates, how many pairs were
// accepted. A batch has its own seed and sums, and these are added in one order: so the
// line does not depend on the number of workers, nor on where they run. Classes S, W and A
// (M is 24, 25, 28) are compared with what is published.
#include "pthread.h"

#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORKERS_MAX = 64, M_MAX = 32, BATCH = 16, ANNULI = 10, PAGE = 4096 };

// x' = MULTIPLIER * x mod 2^46: the multiplier is 5^13.
#define MULTIPLIER 1220703125ull
#define SEED 271828183ull
#define MASK ((1ull << 46) - 1)

typedef struct { double x, y; } sums;
// Batches of one worker, and what came of them in a run. The last count is of what is in no
// annulus.
typedef struct {
    uint64_t first, end, counts[ANNULI + 1];
    sums of[];
} share;

static const struct { int m; sums sums; } published[] = {
    {24, {-3.247834652034740e3, -6.958407078382297e3}},
    {25, {-2.863319731645753e3, -6.320053679109499e3}},
    {28, {-4.295875165629892e3, -1.580732573678431e4}},
};

// What all read, what all write, and what each worker writes are in pages of their own.
static struct { _Alignas(PAGE) int times; uint64_t batches, pairs; } work;
static struct { _Alignas(PAGE) pthread_barrier_t barrier; } all;

// The number that comes so many steps after the seed.
static uint64_t after(uint64_t steps) {
    uint64_t number = SEED, power = MULTIPLIER;
    for (; steps; steps >>= 1) {
        if (steps & 1) number = number * power & MASK;
        power = power * power & MASK;
    }
    return number;
}

// From -1 to 1, without the ends.
static double uniform(uint64_t *number) {
    *number = *number * MULTIPLIER & MASK;
    return (double)(int64_t)*number * 0x1p-45 - 1;
}

static sums add(uint64_t batch, uint64_t *counts) {
    sums of = {0, 0};
    uint64_t number = after(2 * work.pairs * batch);
    for (uint64_t i = 0; i < work.pairs; i++) {
        double x = uniform(&number), y = uniform(&number), t = x * x + y * y;
        if (t > 1) continue;
        double k = sqrt(-2 * log(t) / t);
        x *= k, y *= k;
        of.x += x, of.y += y;
        double larger = fabs(x) > fabs(y) ? fabs(x) : fabs(y);
        counts[larger < ANNULI ? (int)larger : ANNULI]++;
    }
    return of;
}

static void *worker(void *arg) {
    share *own = arg;
    for (int run = 0; run < work.times; run++) {
        pthread_barrier_wait(&all.barrier);
        for (int k = 0; k <= ANNULI; k++) own->counts[k] = 0;
        for (uint64_t k = own->first; k < own->end; k++)
            own->of[k - own->first] = add(k, own->counts);
        pthread_barrier_wait(&all.barrier);
    }
    return 0;
}

static int near(double is, double must) { return fabs((is - must) / must) <= 1e-8; }

static int as_published(int m, sums sum) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (m == published[i].m)
            return near(sum.x, published[i].sums.x) && near(sum.y, published[i].sums.y);
    return 1;
}

int main(int argc, char **argv) {
    int workers = argc > 1 ? atoi(argv[1]) : 4;
    int m = argc > 2 ? atoi(argv[2]) : 20;
    work.times = argc > 3 ? atoi(argv[3]) : 1;
    if (workers < 1 || workers > WORKERS_MAX || m < 1 || m > M_MAX || work.times < 1) return 2;
    work.pairs = 1ull << (m < BATCH ? m : BATCH);
    work.batches = (1ull << m) / work.pairs;
    size_t bytes = (sizeof(share) + work.batches * sizeof(sums) + PAGE - 1) & ~(size_t)(PAGE - 1);
    char *memory = shared_malloc(bytes * workers + PAGE);
    sums *in_order = shared_malloc(work.batches * sizeof *in_order);
    if (!memory || !in_order) return 4;
    char *shares = (char *)(((uintptr_t)memory + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    pthread_barrier_init(&all.barrier, 0, (unsigned)workers + 1);
    pthread_t threads[WORKERS_MAX];
    for (int i = 0; i < workers; i++) {
        share *one = (share *)(shares + bytes * i);
        one->first = work.batches * i / workers, one->end = work.batches * (i + 1) / workers;
        int error = pthread_create(&threads[i], 0, worker, one);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    sums first = {0, 0};
    int wrong = 0;
    for (int run = 0; run < work.times; run++) {
        pthread_barrier_wait(&all.barrier);
        pthread_barrier_wait(&all.barrier);
        uint64_t accepted = 0;
        // A batch that nobody did would show in the sum.
        for (uint64_t k = 0; k < work.batches; k++) in_order[k] = (sums){NAN, NAN};
        for (int i = 0; i < workers; i++) {
            const share *one = (const share *)(shares + bytes * i);
            for (uint64_t k = one->first; k < one->end; k++) in_order[k] = one->of[k - one->first];
            for (int k = 0; k < ANNULI; k++) accepted += one->counts[k];
            wrong |= one->counts[ANNULI] != 0;
        }
        sums sum = {0, 0};
        for (uint64_t k = 0; k < work.batches; k++) sum.x += in_order[k].x, sum.y += in_order[k].y;
        if (run == 0) first = sum;
        wrong |= sum.x != first.x || sum.y != first.y || !as_published(m, sum);
        printf("%d %.16e %.16e %" PRIu64 "\n", run, sum.x, sum.y, accepted);
        fflush(stdout);
        if (wrong) {
            fprintf(stderr, "run %d is not as it must be\n", run);
            return 3;
        }
    }
    for (int i = 0; i < workers; i++) pthread_join(threads[i], 0);
    return 0;
}
