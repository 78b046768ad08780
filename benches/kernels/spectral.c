#include "bench.h"
#include <math.h>
enum { N = 200 };
static double u[N], v[N], t[N];
static double a(int i, int j) { return 1.0 / ((i + j) * (i + j + 1) / 2 + i + 1); }
static NOINLINE void times(const double *x, double *y, int transposed) {
    for (int i = 0; i < N; i++) {
        double s = 0;
        for (int j = 0; j < N; j++) s += (transposed ? a(j, i) : a(i, j)) * x[j];
        y[i] = s;
    }
}
uint32_t kernel(int scale) {
    for (int i = 0; i < N; i++) u[i] = 1;
    for (int n = 0; n < scale * 2; n++) { times(u, t, 0); times(t, v, 1); times(v, t, 0); times(t, u, 1); for (int i = 0; i < N; i++) u[i] *= 0.6; }
    double p = 0, q = 0;
    for (int i = 0; i < N; i++) { p += u[i] * v[i]; q += v[i] * v[i]; }
    return (uint32_t)(int64_t)(sqrt(p / q) * 1e9);
}
