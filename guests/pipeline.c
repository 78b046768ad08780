// argv[1] stages and argv[2] blocks: each stage is a thread that takes blocks of 4 KiB
// from the ring before it, changes them, and puts them into the ring behind it. They
// come out in order, and the hash of them all is the same wherever the stages run.
#include "pthread.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STAGES_MAX = 32, SLOTS = 8, WORDS = 512 };

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    int head, length;
    uint64_t number[SLOTS];
    uint64_t block[SLOTS][WORDS];
} ring;

static ring *rings;
static int stages;
static uint64_t blocks;

static void put(ring *r, uint64_t number, const uint64_t *block) {
    pthread_mutex_lock(&r->lock);
    while (r->length == SLOTS) pthread_cond_wait(&r->emptied, &r->lock);
    int slot = (r->head + r->length) % SLOTS;
    r->number[slot] = number;
    memcpy(r->block[slot], block, sizeof r->block[slot]);
    r->length++;
    pthread_cond_signal(&r->filled);
    pthread_mutex_unlock(&r->lock);
}

static uint64_t get(ring *r, uint64_t *block) {
    pthread_mutex_lock(&r->lock);
    while (r->length == 0) pthread_cond_wait(&r->filled, &r->lock);
    uint64_t number = r->number[r->head];
    memcpy(block, r->block[r->head], sizeof r->block[0]);
    r->head = (r->head + 1) % SLOTS;
    r->length--;
    pthread_cond_signal(&r->emptied);
    pthread_mutex_unlock(&r->lock);
    return number;
}

static void *stage(void *arg) {
    int self = (int)(intptr_t)arg;
    uint64_t block[WORDS];
    for (uint64_t expected = 0; expected < blocks; expected++) {
        uint64_t number = get(&rings[self], block);
        if (number != expected) return (void *)1;
        for (int round = 0; round < 8; round++)
            for (int i = 0; i < WORDS; i++) {
                uint64_t x = block[i] + block[(i + 1) % WORDS] + (uint64_t)self;
                x ^= x >> 12; x ^= x << 25; x ^= x >> 27;
                block[i] = x;
            }
        put(&rings[self + 1], number, block);
    }
    return 0;
}

static void *source(void *arg) {
    (void)arg;
    uint64_t block[WORDS];
    for (uint64_t number = 0; number < blocks; number++) {
        for (int i = 0; i < WORDS; i++) block[i] = (number * WORDS + i) * 0x9e3779b97f4a7c15ull;
        put(&rings[0], number, block);
    }
    return 0;
}

int main(int argc, char **argv) {
    stages = argc > 1 ? atoi(argv[1]) : 4;
    blocks = argc > 2 ? strtoull(argv[2], 0, 10) : 200;
    if (stages < 1 || stages > STAGES_MAX) return 2;
    rings = shared_calloc((size_t)stages + 1, sizeof *rings);
    if (!rings) return 4;
    pthread_t threads[STAGES_MAX + 1];
    for (int i = 0; i <= stages; i++) {
        int error = pthread_create(&threads[i], 0, i < stages ? stage : source, (void *)(intptr_t)i);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    uint64_t block[WORDS], hash = 1;
    for (uint64_t expected = 0; expected < blocks; expected++) {
        if (get(&rings[stages], block) != expected) {
            fprintf(stderr, "block %" PRIu64 " did not come in its turn\n", expected);
            return 3;
        }
        for (int i = 0; i < WORDS; i++) hash = (hash ^ block[i]) * 0x100000001b3ull;
    }
    for (int i = 0; i <= stages; i++) {
        void *wrong;
        pthread_join(threads[i], &wrong);
        if (wrong) return 3;
    }
    printf("%d stages, %" PRIu64 " blocks, hash %016" PRIx64 "\n", stages, blocks, hash);
    return 0;
}
