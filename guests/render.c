// argv[1] workers, argv[2] width, argv[3] height, argv[4] pictures, argv[5] number of the
// first: a ray tracer whose threads take bands of rows as they are free. Prints a line with its
// number and a hash for each picture; argv[6], if any, is a file that the last one is
// written to (PPM). The pictures do not depend on the number of workers, nor on where
// they run.
#include "pthread.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORKERS_MAX = 64, SPHERES = 9, DEPTH = 5, SAMPLES = 3, BAND = 8, PAGE = 4096 };

typedef struct { double x, y, z; } vec;
typedef struct { vec centre, colour; double radius, mirror; } sphere;

// What all read, and what all write, are in pages of their own: as in any program that is
// to be fast on more than one processor, only more so.
static _Alignas(PAGE) sphere scene[SPHERES];
static int workers, width, height, frames, first;
static unsigned char *picture;
static _Alignas(PAGE) atomic_int next_band;
static _Alignas(PAGE) pthread_barrier_t barrier;

static vec add(vec a, vec b) { return (vec){a.x + b.x, a.y + b.y, a.z + b.z}; }
static vec sub(vec a, vec b) { return (vec){a.x - b.x, a.y - b.y, a.z - b.z}; }
static vec mul(vec a, double k) { return (vec){a.x * k, a.y * k, a.z * k}; }
static double dot(vec a, vec b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
static vec unit(vec a) { return mul(a, 1 / sqrt(dot(a, a))); }

static double meets(const sphere *s, vec from, vec way) {
    vec to = sub(from, s->centre);
    double b = dot(to, way), d = b * b - dot(to, to) + s->radius * s->radius;
    if (d < 0) return -1;
    d = sqrt(d);
    if (-b - d > 1e-6) return -b - d;
    return -b + d > 1e-6 ? -b + d : -1;
}

static vec trace(vec from, vec way, int depth) {
    const sphere *hit = 0;
    double near = 1e30;
    for (int i = 0; i < SPHERES; i++) {
        double t = meets(&scene[i], from, way);
        if (t > 0 && t < near) near = t, hit = &scene[i];
    }
    vec point, normal, colour;
    double mirror;
    if (hit) {
        point = add(from, mul(way, near));
        normal = unit(sub(point, hit->centre));
        colour = hit->colour;
        mirror = hit->mirror;
    } else if (way.y < -1e-6) {
        // A floor of squares.
        point = add(from, mul(way, (-1 - from.y) / way.y));
        normal = (vec){0, 1, 0};
        int square = ((int)floor(point.x) + (int)floor(point.z)) & 1;
        colour = square ? (vec){0.9, 0.9, 0.8} : (vec){0.2, 0.2, 0.3};
        mirror = 0.2;
    } else {
        double up = 0.5 * (way.y + 1);
        return (vec){1 - 0.5 * up, 1 - 0.3 * up, 1};
    }
    vec light = unit(sub((vec){5, 8, -6}, point));
    double lit = dot(normal, light);
    if (lit > 0)
        for (int i = 0; i < SPHERES; i++)
            if (meets(&scene[i], point, light) > 0) { lit = 0; break; }
    colour = mul(colour, 0.15 + 0.85 * (lit > 0 ? lit : 0));
    if (mirror <= 0 || depth == 0) return colour;
    vec back = sub(way, mul(normal, 2 * dot(way, normal)));
    return add(mul(colour, 1 - mirror), mul(trace(point, unit(back), depth - 1), mirror));
}

static unsigned char byte(double light) { return (unsigned char)(255 * (light > 1 ? 1 : light) + 0.5); }

static void draw(int y) {
    unsigned char *out = picture + (size_t)y * width * 3;
    for (int x = 0; x < width; x++, out += 3) {
        vec sum = {0, 0, 0};
        for (int i = 0; i < SAMPLES * SAMPLES; i++) {
            double dx = (x + (i % SAMPLES + 0.5) / SAMPLES) / width - 0.5;
            double dy = 0.5 - (y + (i / SAMPLES + 0.5) / SAMPLES) / height;
            vec way = unit((vec){dx * width / height, dy, 1});
            sum = add(sum, trace((vec){0, 0.4, -4}, way, DEPTH));
        }
        sum = mul(sum, 1.0 / (SAMPLES * SAMPLES));
        out[0] = byte(sum.x), out[1] = byte(sum.y), out[2] = byte(sum.z);
    }
}

static void set(int frame) {
    for (int i = 0; i < SPHERES; i++) {
        // Without sine and cosine, which differ between C libraries.
        double a = (frame % 360 * 7 + i * 40) % 360, t = a / 180 - 1, s = 4 * t * (1 - fabs(t));
        scene[i].centre = (vec){2.2 * s, 0.2 * (i % 3) - 0.4, 2 * t};
        scene[i].radius = 0.35 + 0.1 * (i % 4);
        scene[i].colour = (vec){0.3 + 0.08 * i, 0.9 - 0.07 * i, 0.3 + 0.2 * (i % 3)};
        scene[i].mirror = 0.1 * (i % 6);
    }
    atomic_store(&next_band, 0);
}

static void *worker(void *arg) {
    (void)arg;
    for (int frame = 0; frame < frames; frame++) {
        pthread_barrier_wait(&barrier);
        for (int y; (y = atomic_fetch_add(&next_band, 1) * BAND) < height;)
            for (int end = y + BAND; y < end && y < height; y++) draw(y);
        pthread_barrier_wait(&barrier);
    }
    return 0;
}

int main(int argc, char **argv) {
    workers = argc > 1 ? atoi(argv[1]) : 4;
    width = argc > 2 ? atoi(argv[2]) : 320;
    height = argc > 3 ? atoi(argv[3]) : 200;
    frames = argc > 4 ? atoi(argv[4]) : 1;
    first = argc > 5 ? atoi(argv[5]) : 0;
    if (workers < 1 || workers > WORKERS_MAX || first < 0 || width < 1 || height < 1 || frames < 1) return 2;
    size_t bytes = (size_t)width * height * 3;
    // (As what else is shared: bands of whole pages then share none.)
    unsigned char *room = shared_malloc(bytes + PAGE);
    if (!room) return 4;
    picture = room + (PAGE - (uintptr_t)room % PAGE) % PAGE;
    pthread_barrier_init(&barrier, 0, (unsigned)workers + 1);
    pthread_t threads[WORKERS_MAX];
    for (int i = 0; i < workers; i++) {
        int error = pthread_create(&threads[i], 0, worker, 0);
        if (error) {
            fprintf(stderr, "thread %d: no more threads (%d)\n", i, error);
            return 4;
        }
    }
    for (int frame = first; frame < first + frames; frame++) {
        set(frame);
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        uint64_t hash = 0xcbf29ce484222325ull;
        for (size_t i = 0; i < bytes; i++) hash = (hash ^ picture[i]) * 0x100000001b3ull;
        printf("%d %016" PRIx64 "\n", frame, hash);
        fflush(stdout);
    }
    for (int i = 0; i < workers; i++) pthread_join(threads[i], 0);
    if (argc > 6) {
        FILE *file = fopen(argv[6], "wb");
        if (!file) { perror(argv[6]); return 4; }
        fprintf(file, "P6\n%d %d\n255\n", width, height);
        if (fwrite(picture, 1, bytes, file) != bytes || fclose(file)) { perror(argv[6]); return 4; }
    }
    return 0;
}
