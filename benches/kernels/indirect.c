// Objects of four kinds, each called through a pointer in its table.
#include "bench.h"
typedef struct Shape Shape;
typedef struct { uint32_t (*area)(const Shape *, uint32_t); uint32_t (*turn)(Shape *, uint32_t); } Methods;
struct Shape { const Methods *methods; uint32_t a, b; };
static uint32_t square(const Shape *s, uint32_t x) { return s->a * s->a + x; }
static uint32_t rectangle(const Shape *s, uint32_t x) { return s->a * s->b ^ x; }
static uint32_t triangle(const Shape *s, uint32_t x) { return s->a * s->b / 2 - x; }
static uint32_t circle(const Shape *s, uint32_t x) { return s->a * s->a * 3 + (x >> 3); }
static uint32_t swap(Shape *s, uint32_t x) { uint32_t t = s->a; s->a = s->b; s->b = t; return x; }
static uint32_t grow(Shape *s, uint32_t x) { s->a += x & 3; return x + 1; }
static const Methods KINDS[4] = {{square, grow}, {rectangle, swap}, {triangle, swap}, {circle, grow}};
uint32_t kernel(int scale) {
    enum { N = 64 };
    static Shape shapes[N];
    for (int i = 0; i < N; i++) shapes[i] = (Shape){&KINDS[next_random() % 4], next_random() % 100, next_random() % 100};
    uint32_t x = 1;
    for (int n = 0; n < scale * 5000; n++)
        for (int i = 0; i < N; i++) x = shapes[i].methods->turn(&shapes[i], shapes[i].methods->area(&shapes[i], x));
    return x;
}
