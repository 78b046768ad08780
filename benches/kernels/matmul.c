#include "bench.h"
enum { N = 128 };
static double a[N][N], b[N][N], c[N][N];
static NOINLINE void multiply(void) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double s = 0;
            for (int k = 0; k < N; k++) s += a[i][k] * b[k][j];
            c[i][j] = s;
        }
}
uint32_t kernel(int scale) {
    for (int i = 0; i < N; i++) for (int j = 0; j < N; j++) { a[i][j] = i * 0.5 + j; b[i][j] = i - j * 0.25; }
    for (int n = 0; n < scale * 2; n++) { multiply(); a[n % N][0] += c[0][n % N] * 1e-9; }
    return (uint32_t)(int64_t)c[7][7];
}
