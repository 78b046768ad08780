// What all kernels share: each defines `kernel`, which does its work once and
// returns a checksum. `main` times it and prints nanoseconds and checksum.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline))

uint32_t kernel(int scale);

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void print_number(uint64_t value, char end) {
    char text[24];
    int at = sizeof text;
    text[--at] = end;
    do {
        text[--at] = '0' + value % 10;
        value /= 10;
    } while (value);
    write(1, text + at, sizeof text - at);
}

// xorshift32
static uint32_t random_state = 2463534242u;
static uint32_t next_random(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

#ifndef BENCH_NO_MAIN
int main(int argc, char **argv) {
    int scale = argc > 1 ? atoi(argv[1]) : 100;
    uint64_t begun = now_ns();
    uint32_t sum = kernel(scale);
    uint64_t took = now_ns() - begun;
    print_number(took, ' ');
    print_number(sum, '\n');
    return 0;
}
#endif
