/* The reader's side, and the messages of both; see service.h. */

#include "service_wire.h"

#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LOOK_MS = 50 }; /* between two looks whether an answer is still wanted */

/* --- messages ----------------------------------------------------------------------------------------------------- */

bool service_block(int fd)
{
    struct timeval patient = {NET_PATIENCE_MS / 1000, 0};
    return !fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK) &&
           !setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patient, sizeof patient);
}

bool service_put(int fd, const void *data, size_t bytes)
{
    for (size_t at = 0; at < bytes;) {
        ssize_t sent = send(fd, (const char *)data + at, bytes - at, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        at += (size_t)sent;
    }
    return true;
}

bool service_get(int fd, void *data, size_t bytes, int milliseconds, const patience *until)
{
    int64_t end = milliseconds < 0 ? INT64_MAX : net_now_ms() + milliseconds;
    for (size_t at = 0; at < bytes;) {
        int64_t left = end == INT64_MAX ? -1 : end - net_now_ms();
        struct pollfd wait = {fd, POLLIN, 0};
        if (end != INT64_MAX && left <= 0)
            return errno = ETIMEDOUT, false;
        bool looks = until && !at; /* what has begun to come is taken */
        int ready = poll(&wait, 1, looks && (left < 0 || left > LOOK_MS) ? LOOK_MS : (int)left);
        if (looks && ready <= 0 && !until->wanted(until->what))
            return errno = ECANCELED, false;
        if (ready <= 0)
            continue;
        ssize_t got = recv(fd, (char *)data + at, bytes - at, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return errno = got ? errno : 0, false;
        at += (size_t)got;
        if (end == INT64_MAX)
            end = net_now_ms() + NET_PATIENCE_MS; /* what has begun must go on */
    }
    return true;
}

/* --- a connection ------------------------------------------------------------------------------------------------- */

int service_parse(const char *magic, const unsigned char *remote, size_t bytes, service_where *out)
{
    if (bytes < sizeof *out)
        return pd_fail(EPROTO, "the peer's description is not one of this transport");
    memcpy(out, remote, sizeof *out);
    if (memcmp(out->magic, magic, sizeof out->magic) || !net_valid(&out->at))
        return pd_fail(EPROTO, "the peer's description is not one of this version of the transport");
    return sizeof *out;
}

static bool lost(const char *stage)
{
    pd_fail(errno ? errno : EPIPE, "%s: %s", stage, errno ? strerror(errno) : "connection closed");
    return false;
}

static bool dial(client *out, const service_where *where, int milliseconds, const patience *until)
{
    int error = 0, ready = 0;
    socklen_t size = sizeof error;
    out->fd = net_connect(&where->at);
    if (out->fd < 0)
        return errno = -out->fd, lost("cannot be reached");
    struct pollfd wait = {out->fd, POLLOUT, 0};
    for (int64_t end = net_now_ms() + milliseconds; ready <= 0 && net_now_ms() < end;) {
        ready = poll(&wait, 1, LOOK_MS);
        if (ready <= 0 && until && !until->wanted(until->what))
            return errno = ECANCELED, lost("cannot be reached");
    }
    getsockopt(out->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (ready == 1 && !error && service_block(out->fd))
        return true;
    errno = ready == 1 ? error : ETIMEDOUT;
    return lost("cannot be reached");
}

/* The words of a refusal go to pd_fail. */
static bool refused(const client *each, const service_head *head)
{
    char words[PD_MAX_WORDS] = "";
    size_t bytes = head->bytes < sizeof words ? head->bytes : sizeof words - 1;
    if (head->bytes >= sizeof words || !service_get(each->fd, words, bytes, NET_PATIENCE_MS, NULL))
        return lost("lost");
    pd_fail(EACCES, "%s", words);
    return true;
}

static bool greet(client *out, const service_where *where, int milliseconds, const patience *until)
{
    service_head head = {SERVICE_HELLO, sizeof(service_hello)}, back;
    service_hello hello;
    memcpy(hello.magic, where->magic, sizeof hello.magic);
    memcpy(hello.instance, where->instance, SERVICE_INSTANCE);
    if (!service_put(out->fd, &head, sizeof head) || !service_put(out->fd, &hello, sizeof hello) ||
        !service_get(out->fd, &back, sizeof back, milliseconds, until))
        return lost("did not answer");
    if (back.kind != PD_DONE)
        return refused(out, &back), errno = 0, false;
    if (back.bytes < SERVICE_INSTANCE || back.bytes > SERVICE_INSTANCE + SERVICE_EXTRA)
        return pd_fail(EPROTO, "it does not speak this version of the transport"), errno = 0, false;
    out->extra_bytes = back.bytes - SERVICE_INSTANCE;
    if (!service_get(out->fd, out->instance, SERVICE_INSTANCE, milliseconds, NULL) ||
        !service_get(out->fd, out->extra, out->extra_bytes, milliseconds, NULL))
        return lost("did not answer");
    if (memcmp(out->instance, where->instance, SERVICE_INSTANCE))
        return pd_fail(EHOSTUNREACH, "another agent listens at its address now"), errno = 0, false;
    return true;
}

pd_status client_open(client *out, const service_where *where, int milliseconds, const patience *until)
{
    *out = (client){.fd = -1};
    if (dial(out, where, milliseconds, until) && greet(out, where, milliseconds, until))
        return PD_DONE;
    bool unwanted = errno == ECANCELED;
    client_close(out);
    return unwanted ? PD_CANCELLED : PD_PEER_LOST;
}

void client_close(client *each)
{
    if (each->fd >= 0)
        close(each->fd);
    each->fd = -1;
}

/* --- what it is asked --------------------------------------------------------------------------------------------- */

void directory_release(directory *each)
{
    if (!each || atomic_fetch_sub(&each->refs, 1) != 1)
        return;
    pd_release(each->memory);
    free(each->exports);
    free(each);
}

/* NULL: it makes no sense, or there is no memory for it. */
static directory *parse(const unsigned char *body, size_t bytes)
{
    service_memory head;
    if (bytes < sizeof head)
        return NULL;
    memcpy(&head, body, sizeof head);
    if (bytes != sizeof head + head.num_regions * (uint64_t)sizeof(service_region) + head.num_grids * (uint64_t)sizeof(pd_grid))
        return NULL;
    pd_region *regions = calloc(head.num_regions + 1ull, sizeof *regions);
    directory *made = calloc(1, sizeof *made);
    pd_grid *grids = duplicate(body + sizeof head + head.num_regions * sizeof(service_region), head.num_grids, sizeof *grids);
    service_export *exports = calloc(head.num_regions + 1ull, sizeof *exports);
    bool sound = regions && made && grids && exports;
    for (uint32_t i = 0; sound && i < head.num_regions; i++) {
        service_region region;
        memcpy(&region, body + sizeof head + i * sizeof region, sizeof region);
        regions[i] = (pd_region){.address = region.address, .length = region.length, .fd = -1};
        exports[i] = region.found;
        sound = region.length && region.address + region.length > region.address;
    }
    if (sound && !check_grids(regions, head.num_regions, grids, head.num_grids)) {
        *made = (directory){.refs = 1, .generation = head.generation, .exports = exports};
        made->memory = memory_make(regions, head.num_regions, grids, head.num_grids);
    }
    if (!made || !made->memory) {
        free(exports);
        free(made);
        made = NULL;
    }
    free(regions);
    free(grids);
    return made;
}

bool client_begin(client *each)
{
    service_head head = {SERVICE_BEGIN, 0};
    return service_put(each->fd, &head, sizeof head) || lost("lost");
}

directory *client_directory(client *each)
{
    service_head head = {SERVICE_MEMORY, 0};
    if (!service_put(each->fd, &head, sizeof head) || !service_get(each->fd, &head, sizeof head, NET_PATIENCE_MS, NULL))
        return lost("lost"), NULL;
    if (head.kind != PD_DONE)
        return refused(each, &head), NULL;
    unsigned char *body = head.bytes <= SERVICE_MESSAGE ? malloc(head.bytes + 1ull) : NULL;
    directory *made = NULL;
    if (!body || !service_get(each->fd, body, head.bytes, NET_PATIENCE_MS, NULL))
        lost("lost");
    else if (!(made = parse(body, head.bytes)))
        pd_fail(EPROTO, "it broke the protocol: its memory makes no sense");
    free(body);
    return made;
}

int client_ask(client *each, const directory *known, const pd_slice *slice, int milliseconds, patience until)
{
    const pd_lease *lease = slice->lease;
    struct {
        service_head head;
        service_ask ask;
        service_piece pieces[PD_SLICE_PIECES];
    } whole;
    size_t bytes = sizeof whole.ask + slice->count * sizeof(service_piece);
    whole.head = (service_head){SERVICE_READ, (uint32_t)bytes};
    whole.ask = (service_ask){known->generation, lease->number, lease->epoch, (uint32_t)slice->count,
                              (uint32_t)lease->capability_bytes, {0}};
    if (lease->capability_bytes)
        memcpy(whole.ask.capability, lease->capability, lease->capability_bytes);
    for (size_t i = 0; i < slice->count; i++) {
        const pd_piece *piece = &slice->pieces[i];
        whole.pieces[i] = (service_piece){piece->grid, piece->offset, piece->bytes, piece->block, piece->blocks};
    }
    service_head back;
    if (!service_put(each->fd, &whole, sizeof whole.head + bytes))
        return lost("lost"), PD_PEER_LOST;
    for (each->owed++; each->owed; each->owed--) {
        if (!service_get(each->fd, &back, sizeof back, milliseconds, &until)) {
            bool unwanted = errno == ECANCELED;
            lost("lost");
            return unwanted ? PD_CANCELLED : PD_PEER_LOST;
        }
        if (each->owed > 1 && back.bytes && !refused(each, &back))
            return PD_PEER_LOST;
    }
    if (back.kind == PD_DONE && !back.bytes)
        return PD_DONE;
    if (back.kind != PD_NOT_GRANTED && back.kind != PD_ERROR && back.kind != SERVICE_STALE) {
        pd_fail(EPROTO, "it broke the protocol: an answer of kind %u", back.kind);
        return PD_PEER_LOST;
    }
    return refused(each, &back) ? (int)back.kind : PD_PEER_LOST;
}

bool client_go(client *each)
{
    service_head head = {SERVICE_GO, 0};
    return service_put(each->fd, &head, sizeof head) || lost("lost");
}
