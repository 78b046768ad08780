#include "bench.h"
typedef struct { uint32_t key, value; } Slot;
enum { BITS = 16, SIZE = 1 << BITS };
static Slot slots[SIZE];
static NOINLINE Slot *find(uint32_t key) {
    uint32_t at = key * 2654435761u >> (32 - BITS);
    while (slots[at].key && slots[at].key != key) at = (at + 1) & (SIZE - 1);
    return &slots[at];
}
uint32_t kernel(int scale) {
    uint32_t sum = 0;
    for (int n = 0; n < scale * 200000; n++) {
        uint32_t key = 1 + next_random() % 40000;
        Slot *slot = find(key);
        slot->key = key;
        sum += ++slot->value;
    }
    return sum;
}
