// A small pthreads for wasi-threads, over `thread-spawn` and the atomic wait and
// notify instructions. Only what the guests here and zstd need. The C library's
// own is a stub, and its malloc is not locked: see `shared_malloc`.
#ifndef KEEL_PTHREAD_H
#define KEEL_PTHREAD_H

#include <stddef.h>
#include <stdint.h>

// The C library has symbols and types of these names; ours get others.
#define pthread_attr_t keel_pthread_attr_t
#define pthread_barrier_init keel_pthread_barrier_init
#define pthread_barrier_t keel_pthread_barrier_t
#define pthread_barrier_wait keel_pthread_barrier_wait
#define pthread_cond_broadcast keel_pthread_cond_broadcast
#define pthread_cond_destroy keel_pthread_cond_destroy
#define pthread_cond_init keel_pthread_cond_init
#define pthread_cond_signal keel_pthread_cond_signal
#define pthread_cond_t keel_pthread_cond_t
#define pthread_cond_wait keel_pthread_cond_wait
#define pthread_condattr_t keel_pthread_condattr_t
#define pthread_create keel_pthread_create
#define pthread_join keel_pthread_join
#define pthread_mutex_destroy keel_pthread_mutex_destroy
#define pthread_mutex_init keel_pthread_mutex_init
#define pthread_mutex_lock keel_pthread_mutex_lock
#define pthread_mutex_t keel_pthread_mutex_t
#define pthread_mutex_unlock keel_pthread_mutex_unlock
#define pthread_mutexattr_t keel_pthread_mutexattr_t
#define pthread_t keel_pthread_t

typedef struct keel_start *pthread_t;
typedef int pthread_attr_t;
typedef struct { _Atomic int32_t state; } pthread_mutex_t;
typedef int pthread_mutexattr_t;
typedef struct { _Atomic int32_t sequence; } pthread_cond_t;
typedef int pthread_condattr_t;
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int32_t count, waiting, round;
} pthread_barrier_t;

#define PTHREAD_MUTEX_INITIALIZER {0}
#define PTHREAD_COND_INITIALIZER {0}
#define PTHREAD_BARRIER_SERIAL_THREAD (-1)

int pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int pthread_join(pthread_t, void **);
int pthread_mutex_init(pthread_mutex_t *, const pthread_mutexattr_t *);
int pthread_mutex_destroy(pthread_mutex_t *);
int pthread_mutex_lock(pthread_mutex_t *);
int pthread_mutex_unlock(pthread_mutex_t *);
int pthread_cond_init(pthread_cond_t *, const pthread_condattr_t *);
int pthread_cond_destroy(pthread_cond_t *);
int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *);
int pthread_cond_signal(pthread_cond_t *);
int pthread_cond_broadcast(pthread_cond_t *);
int pthread_barrier_init(pthread_barrier_t *, const void *, unsigned);
int pthread_barrier_wait(pthread_barrier_t *);

// The C library's malloc behind a lock.
void *shared_malloc(size_t);
void *shared_calloc(size_t, size_t);
void shared_free(void *);

#endif
