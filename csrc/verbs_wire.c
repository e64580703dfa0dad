/* Messages between two ends of the verbs backend; see verbs.h. */

#include "verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

void wire_open(wire *each, int epoll, int fd, void (*ready)(source *, uint32_t), bool connecting)
{
    *each = (wire){.source = {ready, fd}, .epoll = epoll, .writing = connecting};
    net_watch(epoll, &each->source, connecting, false);
}

void wire_close(wire *each)
{
    net_drop(each->epoll, &each->source);
    free(each->in);
    free(each->out);
    each->in = each->out = NULL;
    each->in_room = each->out_room = each->out_bytes = each->out_at = 0;
}

static void watch(const wire *each)
{
    struct epoll_event event = {(each->deaf ? 0 : EPOLLIN) | (each->writing ? EPOLLOUT : 0), {.ptr = (void *)each}};
    epoll_ctl(each->epoll, EPOLL_CTL_MOD, each->source.fd, &event);
}

void wire_listen(wire *each, bool listens)
{
    if (each->source.fd < 0 || each->deaf == !listens)
        return;
    each->deaf = !listens;
    watch(each);
}

bool wire_flush(wire *each)
{
    if (!net_send(each->source.fd, each->out, each->out_bytes, &each->out_at))
        return false;
    bool blocked = each->out_at < each->out_bytes;
    if (!blocked)
        each->out_at = each->out_bytes = 0;
    bool changed = blocked != each->writing;
    each->writing = blocked;
    if (changed)
        watch(each);
    return true;
}

/* False: the other side has stopped reading, or is gone. */
bool wire_send(wire *each, verbs_kind kind, const void *head, size_t head_bytes, const void *body, size_t body_bytes)
{
    verbs_head front = {kind, (uint32_t)(head_bytes + body_bytes)};
    size_t needed = each->out_bytes + sizeof front + front.bytes;
    if (needed > 2 * (size_t)VERBS_MESSAGE)
        return false;
    if (needed > each->out_room) {
        unsigned char *grown = realloc(each->out, needed);
        if (!grown)
            return false;
        each->out = grown, each->out_room = needed;
    }
    memcpy(each->out + each->out_bytes, &front, sizeof front);
    if (head_bytes)
        memcpy(each->out + each->out_bytes + sizeof front, head, head_bytes);
    if (body_bytes)
        memcpy(each->out + each->out_bytes + sizeof front + head_bytes, body, body_bytes);
    each->out_bytes = needed;
    return wire_flush(each);
}

int wire_receive(wire *each, size_t most)
{
    if (each->in_body && each->got == each->head.bytes)
        each->in_body = false, each->got = 0; /* the last one was taken */
    for (;;) {
        size_t whole = each->in_body ? each->head.bytes : sizeof each->head;
        if (each->got == whole && each->in_body)
            return 1;
        if (each->got == whole) {
            if (each->head.bytes > most)
                return errno = EPROTO, -1;
            if (each->head.bytes > each->in_room) {
                unsigned char *grown = realloc(each->in, each->head.bytes);
                if (!grown)
                    return errno = ENOMEM, -1;
                each->in = grown, each->in_room = each->head.bytes;
            }
            each->in_body = true, each->got = 0;
            continue;
        }
        unsigned char *to = each->in_body ? each->in : (unsigned char *)&each->head;
        ssize_t got = recv(each->source.fd, to + each->got, whole - each->got, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return 0;
        if (got <= 0) {
            errno = got ? errno : 0;
            return -1;
        }
        each->got += (size_t)got;
    }
}
