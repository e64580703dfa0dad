/* Streams, each with a thread that runs its tasks in order; see cuda_emu.h. The first task that fails is what every later
 * question about the stream is answered with, for a context that had a failure is lost. */

#include "cuda_emu.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct task {
    struct task *next;
    cuda_error (*run)(void *work);
    void *work;
} task;

typedef struct stream {
    struct stream *next;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    task *head, **tail;
    bool busy, closing;
    cuda_error error;
} stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the list */
static stream *streams;

void emu_stream_forked(void)
{
    pthread_mutex_init(&lock, NULL);
    streams = NULL;
}

static void *work(void *argument)
{
    stream *self = argument;
    pthread_mutex_lock(&self->lock);
    while (self->head || !self->closing) {
        task *next = self->head;
        if (!next) {
            pthread_cond_wait(&self->changed, &self->lock);
            continue;
        }
        if (!(self->head = next->next))
            self->tail = &self->head;
        self->busy = true;
        pthread_mutex_unlock(&self->lock);
        cuda_error error = next->run(next->work);
        free(next);
        pthread_mutex_lock(&self->lock);
        self->busy = false;
        if (!self->error)
            self->error = error;
    }
    pthread_mutex_unlock(&self->lock);
    free(self);
    return NULL;
}

static stream **find(void *handle)
{
    stream **link = &streams;
    while (*link && *link != handle)
        link = &(*link)->next;
    return link;
}

cuda_error stream_push(void *handle, cuda_error (*run)(void *), void *work_of_task)
{
    task *added = malloc(sizeof *added);
    if (!added)
        return NO_MEMORY;
    *added = (task){NULL, run, work_of_task};
    pthread_mutex_lock(&lock);
    stream *to = *find(handle);
    if (to) {
        pthread_mutex_lock(&to->lock);
        *to->tail = added;
        to->tail = &added->next;
        pthread_cond_signal(&to->changed);
        pthread_mutex_unlock(&to->lock);
    }
    pthread_mutex_unlock(&lock);
    if (!to)
        free(added);
    return to ? 0 : BAD_HANDLE;
}

EMU_API cuda_error cuStreamCreate(void **out, unsigned flags)
{
    CONTEXT_CALL();
    (void)flags;
    stream *made = calloc(1, sizeof *made);
    pthread_t thread;
    if (!made)
        return NO_MEMORY;
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->changed, NULL);
    made->tail = &made->head;
    if (pthread_create(&thread, NULL, work, made)) {
        free(made);
        return NO_MEMORY;
    }
    pthread_detach(thread);
    pthread_mutex_lock(&lock);
    made->next = streams;
    streams = made;
    pthread_mutex_unlock(&lock);
    count(STREAMS, 1);
    *out = made;
    return 0;
}

/* What is queued still runs; nobody waits for it. */
EMU_API cuda_error cuStreamDestroy_v2(void *handle)
{
    CONTEXT_CALL();
    pthread_mutex_lock(&lock);
    stream **link = find(handle), *gone = *link;
    if (gone) {
        *link = gone->next;
        pthread_mutex_lock(&gone->lock);
        gone->closing = true;
        pthread_cond_signal(&gone->changed);
        pthread_mutex_unlock(&gone->lock);
        count(STREAMS, -1);
    }
    pthread_mutex_unlock(&lock);
    return gone ? 0 : BAD_HANDLE;
}

EMU_API cuda_error cuStreamQuery(void *handle)
{
    CONTEXT_CALL();
    cuda_error error = BAD_HANDLE;
    pthread_mutex_lock(&lock);
    stream *found = *find(handle);
    if (found) {
        pthread_mutex_lock(&found->lock);
        error = found->head || found->busy ? NOT_READY : found->error;
        pthread_mutex_unlock(&found->lock);
    }
    pthread_mutex_unlock(&lock);
    return error;
}
