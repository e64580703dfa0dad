/* The backend over HIXL; see hixl.h. Its threads are the core's: a read of a slice asks, then waits for HIXL. */

#include "asker.h"
#include "hixl_engine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char magic[8] = "PDHIXL1";

enum { OPS = 4096 };

typedef struct {
    pd_transport *core;
    hixl_engine engine;
    service *service;
} hixl;

typedef struct {
    hixl *all;
    hixl_link *link;
    asker asker;
} owner;

/* --- the agent's own ---------------------------------------------------------------------------------------------- */

static void hixl_close(void *own)
{
    hixl *all = own;
    if (all->service)
        service_close(all->service);
    hixl_engine_close(&all->engine);
    free(all);
}

static void *hixl_open(pd_transport *core, const pd_options *options)
{
    static const service_hooks none = {NULL, NULL, NULL, NULL};
    if (hixl_probe())
        return NULL;
    hixl *all = calloc(1, sizeof *all);
    if (!all)
        return pd_fail(ENOMEM, "no memory"), NULL;
    all->core = core;
    all->engine.held = -1;
    if (hixl_engine_open(&all->engine, core, options) || !(all->service = service_open(magic, &none, all, options))) {
        hixl_close(all);
        return NULL;
    }
    return all;
}

static int hixl_describe(void *own, unsigned char *out, size_t room)
{
    hixl *all = own;
    hixl_where where = {.service = *service_at(all->service)};
    if (room < sizeof where)
        return pd_fail(ENOSPC, "no room");
    memcpy(where.engine, all->engine.name, sizeof where.engine);
    memcpy(out, &where, sizeof where);
    return sizeof where;
}

static int hixl_publish(void *own, pd_memory *memory)
{
    hixl *all = own;
    int error = hixl_engine_publish(&all->engine, memory);
    return error ? error : service_publish(all->service, memory, NULL);
}

static int hixl_grant(void *own, const pd_lease *lease, const pd_blocks *blocks, size_t num_groups)
{
    return grants_put(service_leases(((hixl *)own)->service), lease, blocks, num_groups);
}

static void hixl_revoke(void *own, uint64_t number, uint64_t epoch)
{
    grants_revoke(service_leases(((hixl *)own)->service), number, epoch);
}

/* --- owners ------------------------------------------------------------------------------------------------------- */

static int parse(const unsigned char *remote, size_t bytes, hixl_where *where)
{
    if (service_parse(magic, remote, bytes, &where->service) < 0)
        return -EPROTO;
    if (bytes != sizeof *where)
        return pd_fail(EPROTO, "the peer's description is not one of this version of hixl");
    memcpy(where, remote, sizeof *where);
    size_t length = strnlen(where->engine, HIXL_ENGINE);
    if (!length || length == HIXL_ENGINE)
        return pd_fail(EPROTO, "the peer's description names no engine");
    return 0;
}

static int hixl_can_reach(void *own, const unsigned char *remote, size_t bytes)
{
    (void)own;
    hixl_where where;
    return parse(remote, bytes, &where);
}

static void hixl_disconnect(void *peer)
{
    owner *each = peer;
    if (each->link)
        hixl_link_put(&each->all->engine, each->link);
    asker_close(&each->asker);
    free(each);
}

static void *hixl_connect(void *own, const unsigned char *remote, size_t bytes)
{
    hixl *all = own;
    hixl_where where;
    if (parse(remote, bytes, &where))
        return NULL;
    owner *made = calloc(1, sizeof *made);
    if (!made || !asker_open(&made->asker, all->core, &where.service, all->engine.settings.transfer_ms)) {
        free(made);
        return made ? NULL : (pd_fail(ENOMEM, "no memory"), NULL);
    }
    made->all = all;
    made->link = hixl_link_get(&all->engine, &where);
    if (!made->link || !hixl_link_try(&all->engine, made->link, made->asker.known->generation))
        return hixl_disconnect(made), NULL;
    return made;
}

/* --- reads -------------------------------------------------------------------------------------------------------- */

static pd_status hixl_read(void *peer, const pd_slice *slice)
{
    owner *each = peer;
    directory *known = NULL;
    pd_status status = asker_ask(&each->asker, slice, &known);
    if (status != PD_DONE)
        return status;
    hixl_op *ops = malloc(OPS * sizeof *ops);
    if (!ops)
        status = PD_ERROR, pd_fail(ENOMEM, "no memory");
    cursor at = {0, 0, 0};
    for (size_t count = 0; status == PD_DONE; count = 0) {
        hixl_op *next = ops;
        while (count < OPS && cursor_at(&at, known->memory, slice->pieces, slice->count, &next->remote, &next->local, &next->bytes)) {
            cursor_move(&at, slice->pieces, next->bytes);
            count++, next++;
        }
        if (!count)
            break;
        status = hixl_link_read(&each->all->engine, each->link, known->generation, ops, count);
    }
    free(ops);
    directory_release(known);
    return status;
}

static unsigned char *hixl_buffer(void *own)
{
    return acl_scratch_lend(&((hixl *)own)->engine.scratch);
}

static pd_status hixl_place(void *own, const pd_rows *rows, size_t count)
{
    return acl_scratch_place(&((hixl *)own)->engine.scratch, rows, count);
}

const pd_backend pd_hixl = {
    .name = "hixl",
    .probe = hixl_probe,
    .slice_bytes = PD_MAX_SLICE_BYTES,
    .per_peer = 4,
    .open = hixl_open,
    .close = hixl_close,
    .describe = hixl_describe,
    .publish = hixl_publish,
    .grant = hixl_grant,
    .revoke = hixl_revoke,
    .can_reach = hixl_can_reach,
    .connect = hixl_connect,
    .disconnect = hixl_disconnect,
    .read = hixl_read,
    .buffer = hixl_buffer,
    .place = hixl_place,
};
