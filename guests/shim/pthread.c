#include "pthread.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { STACK_BYTES = 256 << 10 };

// Read by start.S: stack and tls come first.
struct keel_start {
    void *stack;
    void *tls;
    void *(*run)(void *);
    void *arg;
    void *result;
    void *allocation;
    _Atomic int32_t done;
};

__attribute__((import_module("wasi"), import_name("thread-spawn")))
int32_t keel_thread_spawn(void *start);

static void wait_for(_Atomic int32_t *at, int32_t while_value) {
    __builtin_wasm_memory_atomic_wait32((int32_t *)at, while_value, -1);
}

static void wake(_Atomic int32_t *at, uint32_t count) {
    __builtin_wasm_memory_atomic_notify((int32_t *)at, count);
}

void keel_thread_main(int32_t tid, struct keel_start *start) {
    (void)tid;
    start->result = start->run(start->arg);
    atomic_store(&start->done, 1);
    wake(&start->done, UINT32_MAX);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg) {
    (void)attr;
    size_t tls_size = __builtin_wasm_tls_size();
    size_t tls_align = __builtin_wasm_tls_align();
    if (tls_align < 16) tls_align = 16;
    // The thread-local block, and below it the stack that grows away from it.
    char *allocation = shared_calloc(1, STACK_BYTES + tls_size + tls_align);
    struct keel_start *start = shared_calloc(1, sizeof *start);
    if (!allocation || !start) return EAGAIN;
    uintptr_t top = ((uintptr_t)allocation + STACK_BYTES + tls_align - 1) & ~(tls_align - 1);
    start->allocation = allocation;
    start->stack = (void *)top;
    start->tls = (void *)top;
    start->run = run;
    start->arg = arg;
    *thread = start;
    if (keel_thread_spawn(start) < 0) {
        shared_free(allocation);
        shared_free(start);
        return EAGAIN;
    }
    return 0;
}

int pthread_join(pthread_t thread, void **result) {
    while (!atomic_load(&thread->done)) wait_for(&thread->done, 0);
    if (result) *result = thread->result;
    // The stack stays: the thread may still stand in its last instructions.
    return 0;
}

// 0 free, 1 locked, 2 locked and waited for.
int pthread_mutex_lock(pthread_mutex_t *mutex) {
    int32_t seen = 0;
    if (atomic_compare_exchange_strong(&mutex->state, &seen, 1)) return 0;
    if (seen != 2) seen = atomic_exchange(&mutex->state, 2);
    while (seen != 0) {
        wait_for(&mutex->state, 2);
        seen = atomic_exchange(&mutex->state, 2);
    }
    return 0;
}

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    if (atomic_exchange(&mutex->state, 0) == 2) wake(&mutex->state, 1);
    return 0;
}

int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attr) {
    (void)attr;
    atomic_store(&mutex->state, 0);
    return 0;
}

int pthread_mutex_destroy(pthread_mutex_t *mutex) { (void)mutex; return 0; }

int pthread_cond_init(pthread_cond_t *cond, const pthread_condattr_t *attr) {
    (void)attr;
    atomic_store(&cond->sequence, 0);
    return 0;
}

int pthread_cond_destroy(pthread_cond_t *cond) { (void)cond; return 0; }

int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex) {
    int32_t sequence = atomic_load(&cond->sequence);
    pthread_mutex_unlock(mutex);
    wait_for(&cond->sequence, sequence);
    return pthread_mutex_lock(mutex);
}

int pthread_cond_signal(pthread_cond_t *cond) {
    atomic_fetch_add(&cond->sequence, 1);
    wake(&cond->sequence, 1);
    return 0;
}

int pthread_cond_broadcast(pthread_cond_t *cond) {
    atomic_fetch_add(&cond->sequence, 1);
    wake(&cond->sequence, UINT32_MAX);
    return 0;
}

int pthread_barrier_init(pthread_barrier_t *barrier, const void *attr, unsigned count) {
    (void)attr;
    *barrier = (pthread_barrier_t){.count = (int32_t)count};
    return 0;
}

int pthread_barrier_wait(pthread_barrier_t *barrier) {
    pthread_mutex_lock(&barrier->lock);
    int32_t round = barrier->round;
    if (++barrier->waiting == barrier->count) {
        barrier->waiting = 0;
        barrier->round++;
        pthread_cond_broadcast(&barrier->turn);
        pthread_mutex_unlock(&barrier->lock);
        return PTHREAD_BARRIER_SERIAL_THREAD;
    }
    while (round == barrier->round) pthread_cond_wait(&barrier->turn, &barrier->lock);
    pthread_mutex_unlock(&barrier->lock);
    return 0;
}

static pthread_mutex_t heap = PTHREAD_MUTEX_INITIALIZER;

void *shared_malloc(size_t size) {
    pthread_mutex_lock(&heap);
    void *at = malloc(size);
    pthread_mutex_unlock(&heap);
    return at;
}

void *shared_calloc(size_t count, size_t size) {
    pthread_mutex_lock(&heap);
    void *at = calloc(count, size);
    pthread_mutex_unlock(&heap);
    return at;
}

void shared_free(void *at) {
    pthread_mutex_lock(&heap);
    free(at);
    pthread_mutex_unlock(&heap);
}
