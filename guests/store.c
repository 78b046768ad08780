// argv[1] workers and argv[2] operations each: a key-value store with a lock for each
// bucket, and one for the whole when it grows. Workers add to keys that all share, and
// put, read and remove keys of their own. What is left does not depend on the order.
#include "pthread.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORKERS_MAX = 64, LOCKS = 64, SHARED = 1000, OWN = 300 };

typedef struct entry { struct entry *next; uint64_t key, value; } entry;

static pthread_mutex_t locks[LOCKS];
static entry **buckets;
static uint64_t bucket_count = LOCKS, entries;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;
static int workers;
static uint64_t operations;

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The lock of a key is the same however many buckets there are: they double.
static pthread_mutex_t *lock_of(uint64_t key) { return &locks[mix(key) % LOCKS]; }

static entry **find(uint64_t key) {
    entry **at = &buckets[mix(key) % bucket_count];
    while (*at && (*at)->key != key) at = &(*at)->next;
    return at;
}

static void grow(void) {
    for (int i = 0; i < LOCKS; i++) pthread_mutex_lock(&locks[i]);
    if (entries > 2 * bucket_count) {
        entry **old = buckets;
        uint64_t count = bucket_count;
        entry **more = shared_calloc(2 * count, sizeof *more);
        if (more) {
            buckets = more;
            bucket_count = 2 * count;
            for (uint64_t i = 0; i < count; i++)
                for (entry *one = old[i], *next; one; one = next) {
                    next = one->next;
                    entry **at = &buckets[mix(one->key) % bucket_count];
                    one->next = *at;
                    *at = one;
                }
            shared_free(old);
        }
    }
    for (int i = LOCKS - 1; i >= 0; i--) pthread_mutex_unlock(&locks[i]);
}

static int count(int64_t change) {
    pthread_mutex_lock(&counting);
    entries += (uint64_t)change;
    int crowded = entries % 64 == 0;
    pthread_mutex_unlock(&counting);
    return crowded;
}

static int put(uint64_t key, uint64_t value, int adds) {
    pthread_mutex_lock(lock_of(key));
    entry **at = find(key);
    int fresh = !*at;
    if (fresh) {
        entry *made = shared_malloc(sizeof *made);
        if (!made) abort();
        *made = (entry){0, key, 0};
        *at = made;
    }
    (*at)->value = adds ? (*at)->value + value : value;
    pthread_mutex_unlock(lock_of(key));
    if (fresh && count(1)) grow();
    return fresh;
}

static int get(uint64_t key, uint64_t *value) {
    pthread_mutex_lock(lock_of(key));
    entry *found = *find(key);
    if (found) *value = found->value;
    pthread_mutex_unlock(lock_of(key));
    return found != 0;
}

static int discard(uint64_t key) {
    pthread_mutex_lock(lock_of(key));
    entry **at = find(key), *found = *at;
    if (found) *at = found->next;
    pthread_mutex_unlock(lock_of(key));
    if (!found) return 0;
    shared_free(found);
    count(-1);
    return 1;
}

static void *worker(void *arg) {
    uint64_t self = (uint64_t)(uintptr_t)arg, own[OWN] = {0};
    for (uint64_t i = 0; i < operations; i++) {
        uint64_t draw = mix(self * operations + i), slot = draw % OWN, value = 0;
        uint64_t key = (self + 1) << 32 | slot;
        switch (draw >> 60) {
        case 0: case 1: case 2: case 3: case 4: case 5: case 6: case 7:
            put(draw % SHARED, draw >> 20, 1);
            break;
        case 8: case 9: case 10: case 11:
            own[slot] = draw | 1;
            put(key, own[slot], 0);
            break;
        case 12: case 13: case 14:
            if (get(key, &value) != (own[slot] != 0) || value != own[slot]) return (void *)1;
            break;
        default:
            if (discard(key) != (own[slot] != 0)) return (void *)1;
            own[slot] = 0;
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    workers = argc > 1 ? atoi(argv[1]) : 4;
    operations = argc > 2 ? strtoull(argv[2], 0, 10) : 2000;
    if (workers < 1 || workers > WORKERS_MAX) return 2;
    buckets = shared_calloc(bucket_count, sizeof *buckets);
    if (!buckets) return 4;
    pthread_t threads[WORKERS_MAX];
    for (int i = 0; i < workers; i++) {
        int error = pthread_create(&threads[i], 0, worker, (void *)(intptr_t)i);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    int wrong = 0;
    for (int i = 0; i < workers; i++) {
        void *found;
        pthread_join(threads[i], &found);
        wrong |= found != 0;
    }
    uint64_t left = 0, hash = 0;
    for (uint64_t i = 0; i < bucket_count; i++)
        for (entry *one = buckets[i]; one; one = one->next) left++, hash += mix(one->key ^ mix(one->value));
    printf("%d workers, %" PRIu64 " operations each, %" PRIu64 " keys, hash %016" PRIx64 "\n", workers, operations, left, hash);
    return wrong || left != entries ? 3 : 0;
}
