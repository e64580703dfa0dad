/* The limit that reads within one host are measured against: scattered copies by one and two threads. */

#include "pd.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef struct {
    unsigned char *dst;
    const unsigned char *src;
    const size_t *from, *to;
    size_t first, last, chunk;
    int stream;
} part;

static void *copy_part(void *argument)
{
    const part *p = argument;
    for (size_t i = p->first; i < p->last; i++)
        if (p->stream)
            pd_copy(p->dst + p->to[i] * p->chunk, p->src + p->from[i] * p->chunk, p->chunk);
        else
            memcpy(p->dst + p->to[i] * p->chunk, p->src + p->from[i] * p->chunk, p->chunk);
    return NULL;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static size_t *shuffled(size_t count, unsigned *seed)
{
    size_t *order = calloc(count, sizeof *order);
    for (size_t i = 0; order && i < count; i++)
        order[i] = i;
    for (size_t i = count; order && i > 1; i--) {
        size_t other = (size_t)rand_r(seed) % i, kept = order[i - 1];
        order[i - 1] = order[other], order[other] = kept;
    }
    return order;
}

static unsigned char *pages(size_t bytes, int huge, int value)
{
    unsigned char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    memset(memory, value, bytes);
    return memory;
}

/* What a read finds: every page of the source looked at, the whole destination just written. Without it the later passes
 * would find in the caches what the first ones left there. */
static void settle(const part *whole, size_t bytes)
{
    volatile unsigned char seen;
    for (size_t at = 0; at < bytes; at += 4096)
        seen = whole->src[at];
    (void)seen;
    memset(whole->dst, 2, bytes);
}

/* Seconds that `threads` took for the chunks of `whole`, or a negative errno. */
static double timed(const part *whole, size_t threads)
{
    pthread_t started[2];
    part parts[2];
    size_t running = 0;
    int error = 0;
    double begin = now();
    for (; running < threads && !error; running += !error) {
        parts[running] = *whole;
        parts[running].first = whole->last * running / threads;
        parts[running].last = whole->last * (running + 1) / threads;
        error = pthread_create(&started[running], NULL, copy_part, &parts[running]);
    }
    for (size_t i = 0; i < running; i++)
        pthread_join(started[i], NULL);
    return error ? -error : now() - begin;
}

int pd_limits(size_t chunk, size_t chunks, int huge, double out[4])
{
    size_t bytes;
    if (!chunk || !chunks || __builtin_mul_overflow(chunk, chunks, &bytes) || __builtin_mul_overflow(bytes, 2, &bytes))
        return -EINVAL;
    unsigned seed = (unsigned)time(NULL);
    size_t *from = shuffled(2 * chunks, &seed), *to = shuffled(2 * chunks, &seed); /* twice what is copied, as in a cache */
    unsigned char *src = pages(bytes, huge, 1), *dst = pages(bytes, huge, 2);
    int error = from && to && src && dst ? 0 : -ENOMEM;
    for (int i = 0; i < 4 && !error; i++) {
        part whole = {dst, src, from, to, 0, chunks, chunk, i / 2};
        settle(&whole, bytes);
        double seconds = timed(&whole, (size_t)i % 2 + 1);
        error = seconds < 0 ? (int)seconds : 0;
        out[i] = (double)(chunk * chunks) / seconds / 1e9;
    }
    if (src)
        munmap(src, bytes);
    if (dst)
        munmap(dst, bytes);
    free(from);
    free(to);
    return error;
}
