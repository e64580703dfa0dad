/*
 * Streams and events. Each stream has a thread that runs its tasks in order. A failed task does not stop the ones
 * behind it; the first failure is what the next synchronisation of the stream returns, once. Events carry no failure.
 */

#include "emu.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define MAX_DEVICES 64

typedef struct task {
    struct task *next;
    emu_run run;
    void *work;
} task;

typedef struct stream {
    struct stream *next;
    int device;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    task *head, **tail;
    uint64_t pushed, done;
    int error;
    bool closing;
} stream;

typedef struct {
    int holders; /* the user, and every recording on its way */
    int device;
    uint64_t recorded, reached;
} event;

typedef struct {
    event *what;
    uint64_t turn;
} recording;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the list, the default streams and all events */
static pthread_cond_t reached = PTHREAD_COND_INITIALIZER;
static stream *streams;
static stream *defaults[MAX_DEVICES];

void emu_stream_forked(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&reached, NULL);
    streams = NULL;
    for (int i = 0; i < MAX_DEVICES; i++)
        defaults[i] = NULL;
}

static void *work(void *argument)
{
    stream *self = argument;
    pthread_mutex_lock(&self->lock);
    for (;;) {
        task *next = self->head;
        if (!next && self->closing)
            break;
        if (!next) {
            pthread_cond_wait(&self->changed, &self->lock);
            continue;
        }
        if (!(self->head = next->next))
            self->tail = &self->head;
        pthread_mutex_unlock(&self->lock);
        int error = next->run(next->work);
        free(next);
        pthread_mutex_lock(&self->lock);
        if (!self->error)
            self->error = error;
        self->done++;
        pthread_cond_broadcast(&self->changed);
    }
    pthread_mutex_unlock(&self->lock);
    return NULL;
}

static stream *stream_new(int device)
{
    stream *made = calloc(1, sizeof *made);
    if (!made)
        return NULL;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&made->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&made->lock, NULL);
    made->device = device;
    made->tail = &made->head;
    if (!pthread_create(&made->thread, NULL, work, made))
        return made;
    free(made);
    return NULL;
}

static void stream_free(stream *what)
{
    pthread_mutex_lock(&what->lock);
    what->closing = true;
    pthread_cond_broadcast(&what->changed);
    pthread_mutex_unlock(&what->lock);
    pthread_join(what->thread, NULL);
    pthread_mutex_destroy(&what->lock);
    pthread_cond_destroy(&what->changed);
    free(what);
}

/* NULL is the default stream of the current device. `*status` says why there is none. */
static stream *stream_of(void *handle, int *status)
{
    int device = emu_current_device();
    stream *found = NULL;
    *status = 0;
    pthread_mutex_lock(&lock);
    if (handle) {
        for (stream *each = streams; each && !found; each = each->next)
            if (each == handle)
                found = each;
        if (!found)
            *status = emu_fail(ACL_RT_PARAM, "not a stream");
        else if (found->device != device)
            *status = emu_fail(ACL_RT_STREAM_CONTEXT, "the stream is not of the current context");
    } else {
        if (!defaults[device])
            defaults[device] = stream_new(device);
        found = defaults[device];
        if (!found)
            *status = emu_fail(ACL_RT_INTERNAL, "no thread for the default stream");
    }
    pthread_mutex_unlock(&lock);
    return *status ? NULL : found;
}

int emu_stream_push(void *handle, emu_run run, void *work_of_task)
{
    int status;
    stream *to = stream_of(handle, &status);
    if (!to)
        return status;
    task *added = malloc(sizeof *added);
    if (!added)
        return emu_fail(ACL_RT_INTERNAL, "no memory for a task");
    *added = (task){NULL, run, work_of_task};
    pthread_mutex_lock(&to->lock);
    *to->tail = added;
    to->tail = &added->next;
    to->pushed++;
    pthread_cond_broadcast(&to->changed);
    pthread_mutex_unlock(&to->lock);
    return 0;
}

/* Waits for what was pushed before the call. */
static int synchronize(stream *what, int64_t ms)
{
    int64_t end = emu_deadline(ms);
    struct timespec until = {(time_t)(end / 1000), end % 1000 * 1000000};
    int status = 0, waited = 0;
    pthread_mutex_lock(&what->lock);
    uint64_t goal = what->pushed;
    while (what->done < goal && waited != ETIMEDOUT)
        waited = ms < 0 ? pthread_cond_wait(&what->changed, &what->lock)
                        : pthread_cond_timedwait(&what->changed, &what->lock, &until);
    if (what->done < goal) {
        status = ACL_RT_SYNC_TIMEOUT;
    } else {
        status = what->error;
        what->error = 0;
    }
    pthread_mutex_unlock(&what->lock);
    return status ? emu_fail(status, "synchronising a stream") : 0;
}

int emu_stream_drain(int device)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    stream *all[256];
    int count = 0;
    for (stream *each = streams; each && count < 255; each = each->next)
        if (each->device == device)
            all[count++] = each;
    if (defaults[device])
        all[count++] = defaults[device];
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < count; i++) {
        int status = synchronize(all[i], -1);
        error = error ? error : status;
    }
    return error;
}

EMU_API int aclrtCreateStream(void **made)
{
    EMU_DEVICE_CALL();
    if (!made)
        return emu_fail(ACL_INVALID_PARAM, "no place for the stream");
    stream *created = stream_new(emu_current_device());
    if (!created)
        return emu_fail(ACL_RT_INTERNAL, "no thread for a stream");
    pthread_mutex_lock(&lock);
    created->next = streams;
    streams = created;
    pthread_mutex_unlock(&lock);
    *made = created;
    return 0;
}

/* What is queued still runs, as the documents say of a stream that is destroyed before it was synchronised. */
EMU_API int aclrtDestroyStream(void *handle)
{
    EMU_DEVICE_CALL();
    int status;
    if (!handle)
        return emu_fail(ACL_INVALID_PARAM, "no stream");
    stream *found = stream_of(handle, &status);
    if (!found)
        return status;
    pthread_mutex_lock(&lock);
    stream **link = &streams;
    while (*link && *link != found)
        link = &(*link)->next;
    if (*link)
        *link = found->next;
    pthread_mutex_unlock(&lock);
    stream_free(found);
    return 0;
}

EMU_API int aclrtSynchronizeStream(void *handle)
{
    EMU_DEVICE_CALL();
    int status;
    stream *found = stream_of(handle, &status);
    return found ? synchronize(found, -1) : status;
}

EMU_API int aclrtSynchronizeStreamWithTimeout(void *handle, int32_t ms)
{
    EMU_DEVICE_CALL();
    int status;
    if (ms < -1)
        return emu_fail(ACL_RT_PARAM, "a timeout below -1");
    stream *found = stream_of(handle, &status);
    return found ? synchronize(found, ms) : status;
}

/* With the lock held. */
static void event_drop(event *what)
{
    if (!--what->holders)
        free(what);
}

EMU_API int aclrtCreateEvent(void **made)
{
    EMU_DEVICE_CALL();
    event *created = made ? calloc(1, sizeof *created) : NULL;
    if (!created)
        return emu_fail(ACL_INVALID_PARAM, "no place for the event");
    created->holders = 1;
    created->device = emu_current_device();
    *made = created;
    return 0;
}

EMU_API int aclrtDestroyEvent(void *handle)
{
    EMU_DEVICE_CALL();
    if (!handle)
        return emu_fail(ACL_INVALID_PARAM, "no event");
    pthread_mutex_lock(&lock);
    event_drop(handle);
    pthread_mutex_unlock(&lock);
    return 0;
}

static int record(void *argument)
{
    recording *self = argument;
    pthread_mutex_lock(&lock);
    if (self->what->reached < self->turn)
        self->what->reached = self->turn;
    pthread_cond_broadcast(&reached);
    event_drop(self->what);
    pthread_mutex_unlock(&lock);
    free(self);
    return 0;
}

EMU_API int aclrtRecordEvent(void *handle, void *on)
{
    EMU_DEVICE_CALL();
    event *what = handle;
    recording *added = what ? malloc(sizeof *added) : NULL;
    if (!added)
        return emu_fail(ACL_INVALID_PARAM, "no event");
    pthread_mutex_lock(&lock);
    what->holders++;
    *added = (recording){what, ++what->recorded};
    pthread_mutex_unlock(&lock);
    int status = emu_stream_push(on, record, added);
    if (status)
        record(added);
    return status;
}

EMU_API int aclrtQueryEventStatus(void *handle, int *status)
{
    EMU_DEVICE_CALL();
    event *what = handle;
    if (!what || !status)
        return emu_fail(ACL_INVALID_PARAM, "no event, or no place for its status");
    pthread_mutex_lock(&lock);
    *status = what->recorded && what->reached == what->recorded;
    pthread_mutex_unlock(&lock);
    return 0;
}

EMU_API int aclrtSynchronizeEvent(void *handle)
{
    EMU_DEVICE_CALL();
    event *what = handle;
    if (!what)
        return emu_fail(ACL_INVALID_PARAM, "no event");
    pthread_mutex_lock(&lock);
    uint64_t goal = what->recorded;
    what->holders++;
    while (what->reached < goal)
        pthread_cond_wait(&reached, &lock);
    event_drop(what);
    pthread_mutex_unlock(&lock);
    return goal ? 0 : emu_fail(ACL_RT_PARAM, "the event was never recorded");
}
