/* libhccl.so: the interface, and the operations that run on the streams of libascendcl.so. See hccl.h. */

#include "hccl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK ((size_t)256 << 10)

enum { SEND, RECEIVE };

typedef struct {
    int type;
    void *buf;
    uint64_t count;
    int dataType;
    uint32_t remoteRank;
} HcclSendRecvItem;

typedef struct {
    int type;
    uint32_t peer;
    void *buffer;
    uint64_t bytes;
} item;

/* Items of one lane are run in order, lanes beside one another. */
typedef struct {
    comm *group;
    int64_t deadline;
    uint32_t count;
    item items[];
} operation;

typedef struct {
    operation *of;
    uint32_t first; /* its item and the later ones of the same lane */
    int error;
    pthread_t thread;
} strand;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static comm *comms;

/* A forked child has none of the communicators. */
static void forked(void)
{
    pthread_mutex_init(&lock, NULL);
    comms = NULL;
}

__attribute__((constructor)) static void loaded(void)
{
    pthread_atfork(NULL, NULL, forked);
}

/* With an operation's hold on it, or NULL. */
static comm *comm_hold(void *handle)
{
    pthread_mutex_lock(&lock);
    comm *found = comms;
    while (found && found != handle)
        found = found->next;
    if (found)
        found->holders++;
    pthread_mutex_unlock(&lock);
    return found;
}

static void comm_drop(comm *what)
{
    pthread_mutex_lock(&lock);
    bool last = !--what->holders;
    pthread_mutex_unlock(&lock);
    if (!last)
        return;
    for (uint32_t i = 0; i < MAX_RANKS; i++) {
        if (what->to[i].fd >= 0)
            close(what->to[i].fd);
        if (what->from[i].fd >= 0)
            close(what->from[i].fd);
        pthread_mutex_destroy(&what->to[i].lock);
        pthread_mutex_destroy(&what->from[i].lock);
    }
    free(what);
}

static int comm_error(comm *what, int error)
{
    pthread_mutex_lock(&lock);
    if (!what->error)
        what->error = error;
    int now = what->error || !what->destroyed ? what->error : HCCL_INTERNAL;
    pthread_mutex_unlock(&lock);
    return now;
}

static comm *comm_new(uint32_t ranks, uint32_t rank)
{
    comm *made = calloc(1, sizeof *made);
    if (!made)
        return NULL;
    made->rank = rank;
    made->ranks = ranks;
    made->holders = 1;
    for (uint32_t i = 0; i < MAX_RANKS; i++) {
        made->to[i].fd = made->from[i].fd = -1;
        pthread_mutex_init(&made->to[i].lock, NULL);
        pthread_mutex_init(&made->from[i].lock, NULL);
    }
    return made;
}

/* 0 for a type that there is not. */
static size_t size_of(int type)
{
    static const uint8_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
    return type >= 0 && (size_t)type < sizeof sizes ? sizes[type] : 0;
}

static int reason_of(void)
{
    return errno == ETIMEDOUT ? HCCL_TIMEOUT : HCCL_REMOTE;
}

/* A count, the bytes, and back comes how many of them were expected: both ends fail if that differs. */
static int send_item(int fd, const item *what, int64_t deadline)
{
    uint8_t chunk[CHUNK];
    uint64_t expected = 0;
    if (emu_send(fd, &what->bytes, sizeof what->bytes, deadline))
        return reason_of();
    for (uint64_t at = 0; at < what->bytes; at += CHUNK) {
        size_t now = what->bytes - at < CHUNK ? what->bytes - at : CHUNK;
        if (!emu_copy((emu_end){chunk, EMU_PAGEABLE}, (emu_end){(uint8_t *)what->buffer + at, EMU_DEVICE}, now))
            return HCCL_INTERNAL;
        if (emu_send(fd, chunk, now, deadline))
            return reason_of();
    }
    if (emu_receive(fd, &expected, sizeof expected, deadline))
        return reason_of();
    return expected == what->bytes ? HCCL_OK : HCCL_INTERNAL;
}

static int receive_item(int fd, const item *what, int64_t deadline)
{
    uint8_t chunk[CHUNK];
    uint64_t sent = 0;
    if (emu_receive(fd, &sent, sizeof sent, deadline))
        return reason_of();
    for (uint64_t at = 0; sent == what->bytes && at < sent; at += CHUNK) {
        size_t now = sent - at < CHUNK ? sent - at : CHUNK;
        if (emu_receive(fd, chunk, now, deadline))
            return reason_of();
        if (!emu_copy((emu_end){(uint8_t *)what->buffer + at, EMU_DEVICE}, (emu_end){chunk, EMU_PAGEABLE}, now))
            return HCCL_INTERNAL;
    }
    if (emu_send(fd, &what->bytes, sizeof what->bytes, deadline))
        return reason_of();
    return sent == what->bytes ? HCCL_OK : HCCL_INTERNAL;
}

static bool is_same_lane(const item *one, const item *other)
{
    return one->type == other->type && one->peer == other->peer;
}

static void *run_strand(void *argument)
{
    strand *self = argument;
    operation *of = self->of;
    const item *first = &of->items[self->first];
    lane *on = first->type == SEND ? &of->group->to[first->peer] : &of->group->from[first->peer];
    pthread_mutex_lock(&on->lock);
    for (uint32_t i = self->first; i < of->count && !self->error; i++) {
        if (!is_same_lane(&of->items[i], first))
            continue;
        if (!(self->error = comm_error(of->group, 0)))
            self->error = first->type == SEND ? send_item(on->fd, &of->items[i], of->deadline)
                                              : receive_item(on->fd, &of->items[i], of->deadline);
    }
    /* In the middle of a message the lane is of no use; the partner is to notice. */
    if (self->error)
        shutdown(on->fd, SHUT_RDWR);
    pthread_mutex_unlock(&on->lock);
    return NULL;
}

static bool begins_lane(const operation *of, uint32_t index)
{
    for (uint32_t i = 0; i < index; i++)
        if (is_same_lane(&of->items[i], &of->items[index]))
            return false;
    return true;
}

/* On the stream's worker. */
static int run_operation(void *work)
{
    operation *self = work;
    int injected = 0, error = 0;
    bool fails = emu_fault("stream", &injected);
    strand *strands = calloc(self->count, sizeof *strands);
    uint32_t count = 0;
    self->deadline = emu_deadline(1000 * hccl_seconds("HCCL_EXEC_TIMEOUT", 1836));
    for (uint32_t i = 0; !fails && strands && i < self->count; i++) {
        if (!begins_lane(self, i))
            continue;
        strands[count] = (strand){self, i, 0, 0};
        if (!pthread_create(&strands[count].thread, NULL, run_strand, &strands[count]))
            count++;
        else
            error = HCCL_RUNTIME;
    }
    for (uint32_t i = 0; i < count; i++) {
        pthread_join(strands[i].thread, NULL);
        error = error ? error : strands[i].error;
    }
    if (!strands)
        error = HCCL_RUNTIME;
    if (error)
        comm_error(self->group, error);
    free(strands);
    comm_drop(self->group);
    free(self);
    return fails ? injected : error ? ACL_RT_INTERNAL : 0;
}

static int check_item(const comm *group, const HcclSendRecvItem *what)
{
    size_t size = size_of(what->dataType);
    if (!what->buf)
        return HCCL_PTR;
    if (!size)
        return HCCL_NOT_SUPPORTED;
    if ((what->type != SEND && what->type != RECEIVE) || what->remoteRank >= group->ranks ||
        what->remoteRank == group->rank || what->count > SIZE_MAX / size)
        return HCCL_PARA;
    return !what->count || emu_kind_of(what->buf, what->count * size) == EMU_DEVICE ? HCCL_OK : HCCL_PARA;
}

static int enqueue(comm *group, const HcclSendRecvItem *items, uint32_t count, void *stream)
{
    operation *made = malloc(sizeof *made + count * sizeof *made->items);
    if (!made)
        return HCCL_INTERNAL;
    made->group = group;
    made->count = 0;
    for (uint32_t i = 0; i < count; i++) {
        int status = check_item(group, &items[i]);
        if (status) {
            free(made);
            return status;
        }
        uint64_t bytes = items[i].count * size_of(items[i].dataType);
        if (bytes)
            made->items[made->count++] = (item){items[i].type, items[i].remoteRank, items[i].buf, bytes};
    }
    if (made->count && !emu_stream_push(stream, run_operation, made))
        return HCCL_OK;
    int status = made->count ? HCCL_RUNTIME : HCCL_OK;
    free(made);
    if (!status)
        comm_drop(group);
    return status;
}

static int start(HcclSendRecvItem *items, uint32_t count, void *handle, void *stream)
{
    if (emu_current_device() < 0)
        return HCCL_RUNTIME;
    if (!items || !handle || !stream)
        return HCCL_PTR;
    comm *group = comm_hold(handle);
    if (!group)
        return HCCL_PARA;
    int status = enqueue(group, items, count, stream);
    if (status)
        comm_drop(group);
    return status;
}

EMU_API int HcclGetRootInfo(HcclRootInfo *info)
{
    EMU_FAULT(__func__);
    if (emu_current_device() < 0)
        return HCCL_RUNTIME;
    return info ? hccl_open_root(info) : HCCL_PTR;
}

EMU_API int HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *info, uint32_t rank, void **made)
{
    EMU_FAULT(__func__);
    if (emu_current_device() < 0)
        return HCCL_RUNTIME;
    if (!info || !made)
        return HCCL_PTR;
    if (!ranks || ranks > MAX_RANKS || rank >= ranks)
        return HCCL_PARA;
    comm *created = comm_new(ranks, rank);
    if (!created)
        return HCCL_INTERNAL;
    int status = hccl_gather(created, info, emu_deadline(1000 * hccl_seconds("HCCL_CONNECT_TIMEOUT", 120)));
    if (status) {
        comm_drop(created);
        return status;
    }
    pthread_mutex_lock(&lock);
    created->next = comms;
    comms = created;
    pthread_mutex_unlock(&lock);
    *made = created;
    return HCCL_OK;
}

EMU_API int HcclSend(void *buffer, uint64_t count, int type, uint32_t peer, void *handle, void *stream)
{
    EMU_FAULT(__func__);
    HcclSendRecvItem only = {SEND, buffer, count, type, peer};
    return start(&only, 1, handle, stream);
}

EMU_API int HcclRecv(void *buffer, uint64_t count, int type, uint32_t peer, void *handle, void *stream)
{
    EMU_FAULT(__func__);
    HcclSendRecvItem only = {RECEIVE, buffer, count, type, peer};
    return start(&only, 1, handle, stream);
}

EMU_API int HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, void *handle, void *stream)
{
    EMU_FAULT(__func__);
    return start(items, count, handle, stream);
}

/* What is under way ends with a failure of its stream. */
EMU_API int HcclCommDestroy(void *handle)
{
    EMU_FAULT(__func__);
    if (emu_current_device() < 0)
        return HCCL_RUNTIME;
    if (!handle)
        return HCCL_PTR;
    pthread_mutex_lock(&lock);
    comm **link = &comms;
    while (*link && *link != handle)
        link = &(*link)->next;
    comm *found = *link;
    if (found) {
        *link = found->next;
        found->destroyed = true;
    }
    pthread_mutex_unlock(&lock);
    if (!found)
        return HCCL_PARA;
    for (uint32_t i = 0; i < found->ranks; i++) {
        shutdown(found->to[i].fd, SHUT_RDWR);
        shutdown(found->from[i].fd, SHUT_RDWR);
    }
    comm_drop(found);
    return HCCL_OK;
}

EMU_API int HcclGetCommAsyncError(void *handle, int *error)
{
    EMU_FAULT(__func__);
    if (!handle || !error)
        return HCCL_PTR;
    comm *group = comm_hold(handle);
    if (!group)
        return HCCL_PARA;
    *error = comm_error(group, 0);
    comm_drop(group);
    return HCCL_OK;
}

EMU_API const char *HcclGetErrorString(int code)
{
    switch (code) {
    case HCCL_OK:
        return "no error";
    case HCCL_PARA:
        return "parameter error";
    case HCCL_PTR:
        return "empty pointer";
    case HCCL_INTERNAL:
        return "internal error";
    case HCCL_NOT_SUPPORTED:
        return "not supported";
    case HCCL_TIMEOUT:
        return "timeout";
    case HCCL_TCP_CONNECT:
        return "call tcp connect fail";
    case HCCL_TCP_TRANSFER:
        return "call tcp transmit fail";
    case HCCL_RUNTIME:
        return "call runtime api fail";
    case HCCL_REMOTE:
        return "error occurs in the remote rank";
    default:
        return "unknown error";
    }
}
