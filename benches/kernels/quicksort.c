#include "bench.h"
static NOINLINE void sort(uint32_t *a, int low, int high) {
    while (low < high) {
        uint32_t pivot = a[(low + high) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (a[i] < pivot) i++;
            while (a[j] > pivot) j--;
            if (i <= j) { uint32_t t = a[i]; a[i++] = a[j]; a[j--] = t; }
        }
        if (j - low < high - i) { sort(a, low, j); low = i; } else { sort(a, i, high); high = j; }
    }
}
uint32_t kernel(int scale) {
    enum { N = 100000 };
    uint32_t *a = malloc(N * 4), sum = 0;
    for (int n = 0; n < scale; n++) {
        for (int i = 0; i < N; i++) a[i] = next_random();
        sort(a, 0, N - 1);
        sum += a[n];
    }
    return sum;
}
