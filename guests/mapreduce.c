// argv[1] workers, argv[2] MiB of text, argv[3] times: each worker writes its share of the
// text and counts its words into a table of its own; then each sums its share of the
// words over all tables. Prints how many words there were and a hash of the counts, the
// same however many workers there are.
#include "pthread.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The text is in pieces, of which each has its own seed: who writes it does not matter.
enum { WORKERS_MAX = 64, WORDS = 4096, PIECE = 64 << 10, LETTERS = 8, PAGE = 4096 };

static int workers, mib, times;
static char *text;
// What one worker writes shares no page with what another does.
static uint32_t (*tables)[WORDS];
static _Alignas(PAGE) uint64_t totals[WORDS];
static _Alignas(PAGE) pthread_barrier_t barrier;

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static size_t pieces(void) { return (size_t)mib * (1 << 20) / PIECE; }

static void write_piece(size_t piece) {
    char *out = text + piece * PIECE, *end = out + PIECE;
    for (uint64_t i = 0; end - out > LETTERS; i++) {
        // Some words are frequent, as they are.
        uint64_t draw = mix((uint64_t)piece << 32 | i), word = draw % WORDS * (draw >> 40) % WORDS;
        int length = 3 + word % (LETTERS - 3);
        for (int k = 0; k < length; k++, word /= 7) *out++ = 'a' + (word + k) % 26;
        *out++ = ' ';
    }
    memset(out, ' ', (size_t)(end - out));
}

static void count_piece(size_t piece, uint32_t *table) {
    const char *in = text + piece * PIECE, *end = in + PIECE;
    while (in < end) {
        uint64_t hash = 5381;
        const char *begun = in;
        while (in < end && *in != ' ') hash = hash * 33 + (unsigned char)*in++;
        if (in > begun) table[mix(hash) % WORDS]++;
        in++;
    }
}

static void *worker(void *arg) {
    size_t self = (size_t)(uintptr_t)arg;
    size_t first = pieces() * self / workers, end = pieces() * (self + 1) / workers;
    for (size_t piece = first; piece < end; piece++) write_piece(piece);
    for (int time = 0; time < times; time++) {
        memset(tables[self], 0, sizeof tables[self]);
        for (size_t piece = first; piece < end; piece++) count_piece(piece, tables[self]);
        pthread_barrier_wait(&barrier);
        for (size_t word = WORDS * self / workers; word < WORDS * (self + 1) / workers; word++) {
            totals[word] = 0;
            for (int i = 0; i < workers; i++) totals[word] += tables[i][word];
        }
        pthread_barrier_wait(&barrier);
        // (The totals are looked at.)
        pthread_barrier_wait(&barrier);
    }
    return 0;
}

int main(int argc, char **argv) {
    workers = argc > 1 ? atoi(argv[1]) : 4;
    mib = argc > 2 ? atoi(argv[2]) : 16;
    times = argc > 3 ? atoi(argv[3]) : 1;
    if (workers < 1 || workers > WORKERS_MAX || mib < 1 || mib > 3000 || times < 1) return 2;
    text = shared_malloc((size_t)mib << 20);
    char *memory = shared_calloc((size_t)workers + 1, sizeof *tables);
    tables = (void *)(((uintptr_t)memory + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    if (!text || !memory) {
        fprintf(stderr, "no memory for %d MiB of text\n", mib);
        return 4;
    }
    pthread_barrier_init(&barrier, 0, (unsigned)workers + 1);
    pthread_t threads[WORKERS_MAX];
    for (int i = 0; i < workers; i++) {
        int error = pthread_create(&threads[i], 0, worker, (void *)(intptr_t)i);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    uint64_t first = 0;
    int wrong = 0;
    for (int time = 0; time < times; time++) {
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        uint64_t words = 0, hash = 0xcbf29ce484222325ull;
        for (int i = 0; i < WORDS; i++) {
            words += totals[i];
            hash = (hash ^ totals[i]) * 0x100000001b3ull;
        }
        if (time == 0) first = hash;
        wrong |= hash != first;
        printf("%d %" PRIu64 " words, hash %016" PRIx64 "\n", time, words, hash);
        fflush(stdout);
        pthread_barrier_wait(&barrier);
    }
    for (int i = 0; i < workers; i++) pthread_join(threads[i], 0);
    return wrong ? 3 : 0;
}
