// LZ77 with a hash of four bytes, and its decoder.
#include "bench.h"
enum { N = 1 << 18 };
static uint8_t in[N], packed[N * 2], out[N];
static uint32_t heads[1 << 14];
static NOINLINE int pack(void) {
    int size = 0, at = 0, literal = 0;
    memset(heads, 0, sizeof heads);
    while (at + 8 < N) {
        uint32_t word;
        memcpy(&word, in + at, 4);
        uint32_t hash = word * 2654435761u >> 18;
        int from = heads[hash];
        heads[hash] = at;
        int match = 0;
        if (from < at && at - from < 65536)
            while (match < 255 && at + match < N && in[from + match] == in[at + match]) match++;
        if (match < 5 ) { at++; if (at - literal < 255) continue; match = 0; from = at; }
        packed[size++] = at - literal;
        while (literal < at) packed[size++] = in[literal++];
        packed[size++] = match;
        packed[size++] = at - from;
        packed[size++] = (at - from) >> 8;
        at += match;
        literal = at;
    }
    packed[size++] = 0; packed[size++] = 0; packed[size++] = 0; packed[size++] = 0;
    return size;
}
static NOINLINE int unpack(int size) {
    int to = 0;
    for (int at = 0; at < size;) {
        int literals = packed[at++];
        while (literals--) out[to++] = packed[at++];
        int match = packed[at++], back = packed[at] | packed[at + 1] << 8;
        at += 2;
        while (match--) { out[to] = out[to - back]; to++; }
    }
    return to;
}
uint32_t kernel(int scale) {
    for (int i = 0; i < N; i++) in[i] = i > 64 && next_random() % 8 ? in[i - 1 - next_random() % 3 * 7] : next_random() % 61;
    uint32_t sum = 0;
    for (int n = 0; n < scale; n++) { int size = pack(); sum += size + unpack(size) + out[n]; in[n * 97 % N] ^= n; }
    return sum;
}
