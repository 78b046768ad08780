// One function with one long nest of loops that never returns to its caller:
// prints how long each round took, so that the speed before and after a move
// in the middle can be compared.
#define BENCH_NO_MAIN
#include "bench.h"
enum { N = 64, ROUNDS = 400 };
static double a[N][N], b[N][N], c[N][N];
static uint64_t took[ROUNDS];
int main(void) {
    uint32_t hash = 1;
    for (int i = 0; i < N; i++) for (int j = 0; j < N; j++) { a[i][j] = i * 0.5 + j; b[i][j] = i - j * 0.25; }
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t begun = now_ns();
        for (int n = 0; n < 8; n++) {
            for (int i = 0; i < N; i++)
                for (int j = 0; j < N; j++) {
                    double s = 0;
                    for (int k = 0; k < N; k++) s += a[i][k] * b[k][j];
                    c[i][j] = s;
                }
            for (int i = 0; i < 200000; i++) hash = (hash ^ i) * 16777619u >> (hash & 3);
            a[n][0] += c[0][n] * 1e-9;
        }
        took[round] = now_ns() - begun;
    }
    for (int round = 0; round < ROUNDS; round++) print_number(took[round], '\n');
    return hash == 42;
}
