#include "bench.h"
enum { N = 1000000 };
static uint8_t composite[N];
uint32_t kernel(int scale) {
    uint32_t count = 0;
    for (int n = 0; n < scale; n++) {
        memset(composite, 0, N);
        for (int i = 2; i < N; i++) {
            if (composite[i]) continue;
            count++;
            for (int j = 2 * i; j < N; j += i) composite[j] = 1;
        }
    }
    return count;
}
