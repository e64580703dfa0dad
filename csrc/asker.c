/* See asker.h. */

#include "asker.h"

#include <errno.h>

enum { GREETING_MS = 5000, ATTEMPTS = 4 };

bool asker_open(asker *out, pd_transport *core, const service_where *where, uint32_t patience_ms)
{
    *out = (asker){.core = core, .where = *where, .patience_ms = (int)patience_ms};
    if (client_open(&out->spare[0], where, GREETING_MS, NULL) != PD_DONE)
        return false;
    out->known = client_directory(&out->spare[0]);
    if (!out->known) {
        client_close(&out->spare[0]);
        return false;
    }
    out->num_spare = 1;
    pthread_mutex_init(&out->lock, NULL);
    return true;
}

void asker_close(asker *each)
{
    while (each->num_spare)
        client_close(&each->spare[--each->num_spare]);
    directory_release(each->known);
    pthread_mutex_destroy(&each->lock);
}

/* A connection of this thread's own until it is given back; else as client_open. */
static pd_status borrow(asker *each, client *out, const patience *until)
{
    pthread_mutex_lock(&each->lock);
    bool had = each->num_spare;
    if (had)
        *out = each->spare[--each->num_spare];
    pthread_mutex_unlock(&each->lock);
    if (!had && each->alone)
        return pd_fail(EPIPE, "its connection was lost"), PD_PEER_LOST;
    return had ? PD_DONE : client_open(out, &each->where, GREETING_MS, until);
}

static void give_back(asker *each, client *used, bool of_use)
{
    pthread_mutex_lock(&each->lock);
    bool kept = of_use && each->num_spare < ASKER_CLIENTS;
    if (kept)
        each->spare[each->num_spare++] = *used;
    pthread_mutex_unlock(&each->lock);
    if (!kept)
        client_close(used);
}

typedef struct {
    pd_transport *core;
    const pd_taken *taken;
} waiting;

static bool wanted(void *what)
{
    const waiting *each = what;
    return pd_wanted(each->core, each->taken) && !pd_closing(each->core);
}

static directory *hold(asker *each, directory *fresh)
{
    pthread_mutex_lock(&each->lock);
    directory *old = fresh ? each->known : NULL;
    if (fresh)
        each->known = fresh;
    directory *held = each->known;
    atomic_fetch_add(&held->refs, 1);
    pthread_mutex_unlock(&each->lock);
    directory_release(old);
    return held;
}

pd_status asker_ask(asker *each, const pd_slice *slice, directory **known)
{
    waiting what = {each->core, slice->taken};
    patience until = {wanted, &what};
    client connection;
    int status = borrow(each, &connection, &until);
    if (status != PD_DONE)
        return (pd_status)status;
    status = SERVICE_STALE;
    *known = hold(each, NULL);
    for (int i = 0; i < ATTEMPTS && status == SERVICE_STALE; i++) {
        status = client_ask(&connection, *known, slice, each->patience_ms, until);
        directory *fresh = status == SERVICE_STALE ? client_directory(&connection) : NULL;
        if (status == SERVICE_STALE && !fresh)
            status = PD_PEER_LOST;
        if (!fresh)
            continue;
        directory_release(*known);
        *known = hold(each, fresh);
    }
    if (status == PD_DONE && each->alone && !client_go(&connection))
        status = PD_PEER_LOST;
    give_back(each, &connection, status != PD_PEER_LOST);
    if (status == PD_DONE)
        return PD_DONE;
    directory_release(*known);
    *known = NULL;
    return status == SERVICE_STALE ? PD_PEER_LOST : (pd_status)status;
}
