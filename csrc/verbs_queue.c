/* Reliable queue pairs, what is under way on them, and how they end; see verbs.h. */

#include "verbs_library.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAST = 1, RECEIVED = 2 }; /* wr_id: of a batch's last request; of a place for a write with a number */

/* --- making ------------------------------------------------------------------------------------------------------- */

static int start(queue *made, rail *on)
{
    ib_port_attr port;
    ib_gid gid;
    memset(&port, 0, sizeof port);
    int error = ib.query_port(on->context, on->port, &port);
    if (!error)
        error = ib.query_gid(on->context, on->port, on->gid_index, &gid);
    if (error)
        return pd_fail(EIO, "%s does not say what its port is like: %s", on->name, strerror(error < 0 ? errno : error));
    ib_qp_init_attr wanted = {
        .send_cq = made->cq,
        .recv_cq = made->cq,
        .qp_type = IB_QPT_RC,
        .cap = {.max_send_wr = made->room, .max_recv_wr = 2 * VERBS_DEPTH, .max_send_sge = 1, .max_recv_sge = 1},
    };
    made->qp = ib.create_qp(on->pd, &wanted);
    if (!made->qp)
        return pd_fail(errno, "no queue pair left on %s: %s; fewer peers, or 'queue_pairs': 1", on->name, strerror(errno));
    ib_qp_attr first = {
        .qp_state = IB_QPS_INIT,
        .port_num = on->port,
        .qp_access_flags = IB_REMOTE_READ | IB_REMOTE_WRITE, /* memory decides, by how it was registered */
    };
    error = ib.modify_qp(made->qp, &first, IB_QP_STATE | IB_QP_PKEY_INDEX | IB_QP_PORT | IB_QP_ACCESS_FLAGS);
    if (error)
        return pd_fail(error, "a queue pair of %s does not start: %s", on->name, strerror(error));
    made->end = (verbs_end){
        .number = made->qp->qp_num,
        .sequence = ++on->verbs->next_sequence & 0xffffff,
        .lid = port.lid,
        .mtu = (uint8_t)port.active_mtu,
        .reads = (uint8_t)on->reads_out,
    };
    memcpy(made->end.gid, gid.raw, sizeof made->end.gid);
    return 0;
}

int queue_make(queue *made, rail *on)
{
    memset(made, 0, sizeof *made);
    made->rail = on;
    made->room = (unsigned)(on->max_requests < VERBS_REQUESTS ? on->max_requests : VERBS_REQUESTS);
    int completions = (int)made->room + 2 * VERBS_DEPTH + 1;
    made->cq = ib.create_cq(on->context, completions < on->max_completions ? completions : on->max_completions, made,
                            on->channel, 0);
    int error = made->cq ? start(made, on)
                         : pd_fail(errno, "no completion queue left on %s: %s; fewer peers", on->name, strerror(errno));
    if (!error && ib_req_notify_cq(made->cq))
        error = pd_fail(EIO, "%s does not notify of completions", on->name);
    made->next = on->queues;
    if (made->next)
        made->next->at = &made->next;
    made->at = &on->queues;
    on->queues = made;
    if (error)
        queue_free(made);
    return error;
}

static int join(queue *each)
{
    const rail *on = each->rail;
    const verbs_end *other = &each->other;
    const verbs_settings *settings = &on->verbs->settings;
    int reads = other->reads ? other->reads : 1;
    ib_qp_attr ready = {
        .qp_state = IB_QPS_RTR,
        .path_mtu = each->end.mtu < other->mtu ? each->end.mtu : other->mtu,
        .dest_qp_num = other->number,
        .rq_psn = other->sequence,
        .max_dest_rd_atomic = (uint8_t)(reads < on->reads_in ? reads : on->reads_in),
        .min_rnr_timer = 12, /* 0.64 ms */
        .ah_attr = {.port_num = on->port, .dlid = other->lid},
    };
    if (on->link_layer == IB_LINK_ETHERNET || memcmp(each->end.gid, other->gid, 8)) { /* another subnet */
        ready.ah_attr.is_global = 1;
        ready.ah_attr.grh.sgid_index = on->gid_index;
        ready.ah_attr.grh.hop_limit = 64;
        ready.ah_attr.grh.traffic_class = (uint8_t)settings->traffic_class;
        memcpy(ready.ah_attr.grh.dgid.raw, other->gid, sizeof other->gid);
    }
    int error = ib.modify_qp(each->qp, &ready, IB_QP_STATE | IB_QP_AV | IB_QP_PATH_MTU | IB_QP_DEST_QPN | IB_QP_RQ_PSN |
                                                   IB_QP_MAX_DEST_RD_ATOMIC | IB_QP_MIN_RNR_TIMER);
    ib_qp_attr send = {
        .qp_state = IB_QPS_RTS,
        .sq_psn = each->end.sequence,
        .timeout = (uint8_t)settings->timeout,
        .retry_cnt = (uint8_t)settings->retries,
        .rnr_retry = 6, /* 7 is for ever */
        .max_rd_atomic = (uint8_t)(reads < on->reads_out ? reads : on->reads_out),
    };
    if (!error)
        error = ib.modify_qp(each->qp, &send, IB_QP_STATE | IB_QP_TIMEOUT | IB_QP_RETRY_CNT | IB_QP_RNR_RETRY | IB_QP_SQ_PSN |
                                                  IB_QP_MAX_QP_RD_ATOMIC);
    if (error)
        return pd_fail(error, "%s cannot be joined to the peer's port: %s; is there a route between them, and of one kind "
                       "(RoCE v2 over IPv4)?", on->name, strerror(error));
    return 0;
}

static void *run_joiner(void *argument)
{
    verbs *all = argument;
    pthread_mutex_lock(&all->lock);
    while (!atomic_load(&all->stop)) {
        queue *each = all->joins;
        if (!each) {
            pthread_cond_wait(&all->to_join, &all->lock);
            continue;
        }
        all->joins = each->next_to_join;
        pthread_mutex_unlock(&all->lock);
        int error = join(each);
        if (error)
            snprintf(each->words, sizeof each->words, "%s", pd_last_error());
        atomic_store(&each->joining, error ? JOINED_ILL : JOINED_WELL);
        net_ring(all->bell.fd);
        pthread_mutex_lock(&all->lock);
    }
    pthread_mutex_unlock(&all->lock);
    return NULL;
}

void queue_join(queue *each, const verbs_end *other)
{
    verbs *all = each->rail->verbs;
    each->other = *other;
    each->next_to_join = NULL;
    atomic_store(&each->joining, TO_JOIN);
    pthread_mutex_lock(&all->lock);
    queue **last = &all->joins;
    while (*last)
        last = &(*last)->next_to_join;
    *last = each;
    pthread_cond_signal(&all->to_join);
    pthread_mutex_unlock(&all->lock);
}

int joiner_start(verbs *all)
{
    int error = pd_start(&all->joiner, run_joiner, all);
    all->joining = !error;
    return error ? pd_fail(error, "cannot start a thread: %s", strerror(error)) : 0;
}

/* After `stop` was set. */
void joiner_stop(verbs *all)
{
    pthread_mutex_lock(&all->lock);
    pthread_cond_signal(&all->to_join);
    pthread_mutex_unlock(&all->lock);
    if (all->joining)
        pthread_join(all->joiner, NULL);
    all->joining = false;
}

/* --- work --------------------------------------------------------------------------------------------------------- */

/* Hand requests over in one chain; the last one is the one that tells. The queue is broken after an error. */
int queue_post(queue *each, ib_send_wr *requests, unsigned count, void *what)
{
    ib_send_wr *bad = NULL;
    for (unsigned i = 0; i < count; i++) {
        requests[i].next = i + 1 < count ? &requests[i + 1] : NULL;
        requests[i].wr_id = i + 1 < count ? 0 : LAST;
        requests[i].send_flags = i + 1 < count ? 0 : IB_SEND_SIGNALED;
    }
    int error = ib_post_send(each->qp, requests, &bad);
    if (error) {
        /* What came before it is under way without an end: only breaking the queue pair, and then removing it, tells. */
        snprintf(each->words, sizeof each->words, "the device took %d of %u requests: %s", bad ? (int)(bad - requests) : 0,
                 count, strerror(error < 0 ? errno : error));
        queue_break(each);
        return -EIO;
    }
    each->batches[(each->first + each->count++) % VERBS_REQUESTS].what = what;
    each->batches[(each->first + each->count - 1) % VERBS_REQUESTS].requests = count;
    each->room -= count;
    return 0;
}

void queue_receive(queue *each, unsigned count)
{
    ib_recv_wr place = {.wr_id = RECEIVED}, *bad;
    while (count-- && !each->broken)
        ib_post_recv(each->qp, &place, &bad);
}

void queue_break(queue *each)
{
    ib_qp_attr gone = {.qp_state = IB_QPS_ERR};
    if (each->qp)
        ib.modify_qp(each->qp, &gone, IB_QP_STATE);
    each->broken = true;
}

bool queue_quiet(const queue *each)
{
    return !each->count;
}

/* Also when something is under way: the device has finished with a queue pair when it is removed. */
bool queue_free(queue *each)
{
    if (!each->rail)
        return true;
    if (each->qp && ib.destroy_qp(each->qp))
        return false;
    each->qp = NULL;
    if (each->cq)
        ib.destroy_cq(each->cq);
    *each->at = each->next;
    if (each->next)
        each->next->at = each->at;
    each->cq = NULL, each->rail = NULL;
    each->count = 0;
    return true;
}

/* --- completions -------------------------------------------------------------------------------------------------- */

static void fail(queue *each, const ib_wc *found)
{
    if (each->error || found->status == IB_WC_WR_FLUSH_ERR)
        return;
    each->error = found->status;
    snprintf(each->words, sizeof each->words, "%s%s", ib.wc_status_str(found->status),
             found->status == IB_WC_RETRY_EXC_ERR    ? " (its host, its port or the way to it is gone)"
             : found->status == IB_WC_REM_ACCESS_ERR ? " (it does not know that key or address: its memory has changed)"
                                                     : "");
}

static void take(queue *each, const ib_wc *found)
{
    if (found->status != IB_WC_SUCCESS) {
        fail(each, found);
        if (!each->broken)
            queue_break(each);
    }
    if (found->wr_id == RECEIVED && found->status == IB_WC_SUCCESS) {
        queue_receive(each, 1);
        each->arrived(each, ntohl(found->imm_data));
    }
    if (found->wr_id != LAST || !each->count)
        return;
    void *what = each->batches[each->first].what;
    each->room += each->batches[each->first].requests;
    each->first = (each->first + 1) % VERBS_REQUESTS;
    each->count--;
    each->landed(each, what, found->status == IB_WC_SUCCESS);
}

static bool look(queue *each)
{
    ib_wc found[16];
    bool any = false;
    for (int count; each->cq && (count = ib_poll_cq(each->cq, 16, found)) > 0; any = true)
        for (int i = 0; i < count; i++)
            take(each, &found[i]);
    return any;
}

bool rails_look(verbs *all)
{
    bool any = false;
    for (int i = 0; i < all->num_rails; i++)
        for (queue *each = all->rails[i].queues; each; each = each->next)
            any |= look(each);
    return any;
}

void rail_completions(source *self, uint32_t events)
{
    (void)events;
    rail *each = (rail *)self;
    ib_cq *cq;
    void *which;
    while (!ib.get_cq_event(each->channel, &cq, &which)) {
        ib.ack_cq_events(cq, 1);
        ib_req_notify_cq(cq); /* first, so that nothing that comes while we look is missed */
        look(which);
    }
}
