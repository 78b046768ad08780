// Compresses argv[3] KiB of generated text at level argv[2] with argv[1] workers,
// prints the size and a hash of the compressed bytes, decompresses, compares.
// With more than one argv[4], does it so many times.
#define ZSTD_STATIC_LINKING_ONLY
#include "zstd.h"

#include "pthread.h"

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *take(void *opaque, size_t size) { (void)opaque; return shared_malloc(size); }
static void give(void *opaque, void *at) { (void)opaque; shared_free(at); }

static void fill(char *text, size_t size) {
    static const char *const words[] = {"even ", "keel ", "load ", "node ", "moves ", "while ", "it ", "runs, ", "and ", "nothing ", "stops. ", "thread ", "page ", "object ", "machine ", "\n"};
    uint64_t state = 88172645463325252ull;
    for (size_t at = 0; at < size;) {
        state ^= state << 13; state ^= state >> 7; state ^= state << 17;
        const char *word = words[state & 15];
        if ((state >> 8 & 15) == 0) {
            text[at++] = (char)(state >> 16);
            continue;
        }
        for (; *word && at < size; word++) text[at++] = *word;
    }
}

static uint64_t hash(const uint8_t *bytes, size_t size) {
    uint64_t sum = 14695981039346656037ull;
    for (size_t at = 0; at < size; at++) sum = (sum ^ bytes[at]) * 1099511628211ull;
    return sum;
}

static int fail(const char *what, size_t code) {
    fprintf(stderr, "%s: %s\n", what, ZSTD_getErrorName(code));
    return 3;
}

int main(int argc, char **argv) {
    int workers = argc > 1 ? atoi(argv[1]) : 4, level = argc > 2 ? atoi(argv[2]) : 3;
    size_t size = (argc > 3 ? strtoul(argv[3], 0, 10) : 4096) << 10;
    int times = argc > 4 ? atoi(argv[4]) : 1;
    ZSTD_customMem memory = {take, give, 0};
    char *text = shared_malloc(size), *back = shared_malloc(size);
    size_t bound = ZSTD_compressBound(size);
    uint8_t *out = shared_malloc(bound);
    ZSTD_CCtx *context = ZSTD_createCCtx_advanced(memory);
    ZSTD_DCtx *reader = ZSTD_createDCtx_advanced(memory);
    if (!text || !back || !out || !context || !reader) return 2;
    fill(text, size);
    ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level);
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
    ZSTD_CCtx_setParameter(context, ZSTD_c_jobSize, 512 << 10);
    size_t set = ZSTD_CCtx_setParameter(context, ZSTD_c_nbWorkers, workers);
    if (ZSTD_isError(set)) return fail("workers", set);
    for (int time = 0; time < times; time++) {
        ZSTD_inBuffer in = {text, size, 0};
        ZSTD_outBuffer to = {out, bound, 0};
        size_t left;
        do {
            left = ZSTD_compressStream2(context, &to, &in, ZSTD_e_end);
            if (ZSTD_isError(left)) return fail("compress", left);
        } while (left);
        printf("%zu bytes to %zu, %016" PRIx64 "\n", size, to.pos, hash(out, to.pos));
        fflush(stdout);
        memset(back, 0, size);
        size_t got = ZSTD_decompressDCtx(reader, back, size, out, to.pos);
        if (ZSTD_isError(got)) return fail("decompress", got);
        if (got != size || memcmp(text, back, size)) return 4;
    }
    ZSTD_freeCCtx(context);
    ZSTD_freeDCtx(reader);
    return 0;
}
