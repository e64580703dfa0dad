/* The limit that a transport within one host is measured against: scattered copies by one and two threads of a process
 * of its own, with memcpy (t1, t2) and with our streaming stores (nt1, nt2). Prints four figures in GB/s.
 *
 *     limit CHUNK_BYTES CHUNKS HUGE(0|1)
 */

#include "../csrc/pd.h"

#include <pthread.h>
#include <stdio.h>
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

static size_t *shuffled(size_t count)
{
    size_t *order = calloc(count, sizeof *order);
    for (size_t i = 0; i < count; i++)
        order[i] = i;
    for (size_t i = count; i > 1; i--) {
        size_t other = (size_t)rand() % i, kept = order[i - 1];
        order[i - 1] = order[other], order[other] = kept;
    }
    return order;
}

int main(int count, char **arguments)
{
    if (count != 4)
        return fprintf(stderr, "usage: limit CHUNK_BYTES CHUNKS HUGE\n"), 2;
    size_t chunk = strtoul(arguments[1], NULL, 10), chunks = strtoul(arguments[2], NULL, 10), bytes = 2 * chunk * chunks;
    unsigned char *memory[2];
    srand((unsigned)time(NULL));
    for (int i = 0; i < 2; i++) {
        memory[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory[i] == MAP_FAILED)
            return perror("mmap"), 1;
        madvise(memory[i], bytes, atoi(arguments[3]) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        memset(memory[i], i + 1, bytes);
    }
    size_t *from = shuffled(2 * chunks), *to = shuffled(2 * chunks); /* twice as many blocks as are copied */
    for (int stream = 0; stream < 2; stream++)
        for (size_t threads = 1; threads < 3; threads++) {
            pthread_t started[2];
            part parts[2];
            double begin = now();
            for (size_t i = 0; i < threads; i++) {
                parts[i] = (part){memory[0], memory[1], from, to, chunks * i / threads, chunks * (i + 1) / threads, chunk, stream};
                pthread_create(&started[i], NULL, copy_part, &parts[i]);
            }
            for (size_t i = 0; i < threads; i++)
                pthread_join(started[i], NULL);
            printf("%.3f ", (double)(chunk * chunks) / (now() - begin) / 1e9);
        }
    puts("");
    return 0;
}
