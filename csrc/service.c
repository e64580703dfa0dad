/* The owner's side; see service.h. */

#include "service_wire.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

typedef struct visit {
    struct visit *next;
    service *all;
    pthread_t thread;
    int fd;
    atomic_bool over;    /* its thread has nothing left to do */
    atomic_bool greeted;
    void *state;
    service_ask asked;
    service_piece pieces[PD_SLICE_PIECES];
    pd_piece judged[PD_SLICE_PIECES];
    pd_memory *going; /* what the last yes was about */
    char words[PD_MAX_WORDS];
} visit;

struct service {
    service_where where;
    const service_hooks *hooks;
    void *own;
    grants leases;
    pthread_mutex_t lock; /* guards the four below */
    pd_memory *memory;
    service_export *exports;
    uint64_t generation;
    visit *visits;
    unsigned num_visits; /* the listening thread's own */
    int listener, spare, bell;
    pthread_t thread;
    bool running;
    atomic_bool stop;
};

const service_where *service_at(const service *all)
{
    return &all->where;
}

grants *service_leases(service *all)
{
    return &all->leases;
}

int service_publish(service *all, pd_memory *memory, service_export *exports)
{
    grants_publish(&all->leases, memory);
    pd_retain(memory);
    pthread_mutex_lock(&all->lock);
    pd_memory *old = all->memory;
    service_export *unused = all->exports;
    all->memory = memory;
    all->exports = exports;
    all->generation++;
    pthread_mutex_unlock(&all->lock);
    pd_release(old);
    free(unused);
    return 0;
}

/* --- a reader's connection, on its thread ------------------------------------------------------------------------- */

static bool answer(visit *each, uint32_t status, const void *body, size_t bytes)
{
    service_head head = {status, (uint32_t)bytes};
    return service_put(each->fd, &head, sizeof head) && (!bytes || service_put(each->fd, body, bytes));
}

static bool refuse(visit *each, uint32_t status, const char *words)
{
    return answer(each, status, words, strlen(words));
}

static bool tell_memory(visit *each)
{
    service *all = each->all;
    pthread_mutex_lock(&all->lock);
    const pd_memory *memory = all->memory;
    service_memory head = {all->generation, memory ? (uint32_t)memory->num_regions : 0, memory ? (uint32_t)memory->num_grids : 0};
    size_t bytes = sizeof head + head.num_regions * sizeof(service_region) + head.num_grids * sizeof(pd_grid);
    unsigned char *body = bytes <= SERVICE_MESSAGE ? malloc(bytes) : NULL;
    if (body) {
        memcpy(body, &head, sizeof head);
        unsigned char *at = body + sizeof head;
        for (uint32_t i = 0; i < head.num_regions; i++, at += sizeof(service_region)) {
            service_region region = {memory->regions[i].address, memory->regions[i].length, {{0}, 0}};
            if (all->exports)
                region.found = all->exports[i];
            memcpy(at, &region, sizeof region);
        }
        if (head.num_grids)
            memcpy(at, memory->grids, head.num_grids * sizeof(pd_grid));
    }
    pthread_mutex_unlock(&all->lock);
    bool told = body ? answer(each, PD_DONE, body, bytes) : refuse(each, PD_ERROR, "its memory has too many grids to tell of");
    free(body);
    return told;
}

/* PD_DONE: yes, and `memory` is held for it. */
static uint32_t judge(visit *each, pd_memory **memory)
{
    service *all = each->all;
    const service_ask *asked = &each->asked;
    pthread_mutex_lock(&all->lock);
    bool stale = asked->generation != all->generation;
    pd_memory *held = stale ? NULL : all->memory;
    if (held)
        pd_retain(held);
    pthread_mutex_unlock(&all->lock);
    if (!held)
        return SERVICE_STALE;
    pd_status status = PD_DONE;
    pthread_mutex_lock(&all->leases.lock);
    const grant *leased = grants_find(&all->leases, asked->number, asked->epoch);
    bool refused = !leased || !grant_opens(leased, asked->capability, asked->capability_bytes);
    for (uint32_t i = 0; i < asked->pieces && status != PD_ERROR; i++) {
        status = grant_judge(leased, held, &each->judged[i], each->words);
        refused |= status == PD_NOT_GRANTED;
    }
    if (status != PD_ERROR && refused) {
        status = PD_NOT_GRANTED;
        grant_refuse(leased, asked->number, asked->epoch, each->words);
    }
    pthread_mutex_unlock(&all->leases.lock);
    if (status == PD_DONE)
        *memory = held;
    else
        pd_release(held);
    return status;
}

/* The pieces of a request that can be; false: hang up. */
static bool take_pieces(visit *each, size_t bytes)
{
    const service_ask *asked = &each->asked;
    if (!asked->pieces || asked->pieces > PD_SLICE_PIECES || asked->capability_bytes > PD_MAX_CAPABILITY ||
        bytes != sizeof *asked + asked->pieces * sizeof(service_piece) ||
        !service_get(each->fd, each->pieces, asked->pieces * sizeof(service_piece), NET_PATIENCE_MS, NULL))
        return false;
    uint64_t total = 0;
    for (uint32_t i = 0; i < asked->pieces; i++) {
        const service_piece *wire = &each->pieces[i];
        if (!wire->bytes || !wire->blocks || wire->bytes > PD_MAX_SLICE_BYTES || wire->blocks > PD_MAX_SLICE_BYTES)
            return false;
        total += wire->bytes * wire->blocks;
        each->judged[i] = (pd_piece){wire->grid, wire->offset, wire->bytes, wire->block, wire->blocks, NULL};
    }
    return total <= PD_MAX_SLICE_BYTES;
}

static bool consider(visit *each, size_t bytes)
{
    if (bytes < sizeof each->asked || !service_get(each->fd, &each->asked, sizeof each->asked, NET_PATIENCE_MS, NULL) ||
        !take_pieces(each, bytes))
        return false;
    pd_memory *memory = NULL;
    uint32_t status = judge(each, &memory);
    pd_release(each->going);
    each->going = memory;
    return status == PD_DONE ? answer(each, status, NULL, 0)
                             : refuse(each, status, status == SERVICE_STALE ? "its memory has changed" : each->words);
}

static bool go(visit *each)
{
    pd_memory *memory = each->going;
    each->going = NULL;
    bool done = memory && each->all->hooks->serve &&
                each->all->hooks->serve(each->state, memory, each->judged, each->asked.pieces);
    pd_release(memory);
    return done;
}

static bool greet(visit *each)
{
    service *all = each->all;
    service_head head;
    service_hello hello;
    if (!service_get(each->fd, &head, sizeof head, SERVICE_GREETING_MS, NULL) || head.kind != SERVICE_HELLO ||
        head.bytes != sizeof hello || !service_get(each->fd, &hello, sizeof hello, SERVICE_GREETING_MS, NULL) ||
        memcmp(hello.magic, all->where.magic, sizeof hello.magic))
        return false;
    /* Also when another was meant: the reader tells by the instance. */
    unsigned char body[SERVICE_INSTANCE + SERVICE_EXTRA];
    size_t extra = 0;
    bool means_us = !memcmp(hello.instance, all->where.instance, SERVICE_INSTANCE);
    memcpy(body, all->where.instance, SERVICE_INSTANCE);
    if (means_us && all->hooks->greet && !(each->state = all->hooks->greet(all->own, body + SERVICE_INSTANCE, &extra)))
        return refuse(each, PD_ERROR, pd_last_error()), false;
    return answer(each, PD_DONE, body, SERVICE_INSTANCE + extra) && means_us;
}

static void *run_visit(void *argument)
{
    visit *each = argument;
    service_head head;
    bool (*begin)(void *, int) = each->all->hooks->begin;
    bool goes_on = greet(each);
    atomic_store(&each->greeted, true);
    while (goes_on && service_get(each->fd, &head, sizeof head, -1, NULL)) {
        if (head.kind == SERVICE_MEMORY && !head.bytes)
            goes_on = tell_memory(each);
        else if (head.kind == SERVICE_BEGIN && !head.bytes && begin)
            goes_on = begin(each->state, each->fd), begin = NULL;
        else
            goes_on = head.kind == SERVICE_READ ? consider(each, head.bytes) : head.kind == SERVICE_GO && !head.bytes && go(each);
    }
    pd_release(each->going);
    if (each->state && each->all->hooks->end)
        each->all->hooks->end(each->state);
    shutdown(each->fd, SHUT_RDWR); /* the reader learns of it now; the number stays taken until the thread is joined */
    atomic_store(&each->over, true);
    net_ring(each->all->bell);
    return NULL;
}

/* --- listening ---------------------------------------------------------------------------------------------------- */

/* Silent strangers must not keep readers out. */
static void show_out(service *all)
{
    unsigned strangers = 0;
    visit *oldest = NULL;
    pthread_mutex_lock(&all->lock);
    for (visit *each = all->visits; each; each = each->next) /* the newest first */
        if (!atomic_load(&each->greeted)) {
            strangers++;
            oldest = each;
        }
    if (strangers >= SERVICE_STRANGERS) {
        atomic_store(&oldest->greeted, true); /* its thread may take a while to notice: another one is next */
        shutdown(oldest->fd, SHUT_RDWR);
    }
    pthread_mutex_unlock(&all->lock);
}

static void begin_visit(service *all, int fd)
{
    show_out(all);
    visit *made = all->num_visits < SERVICE_CONNECTIONS ? calloc(1, sizeof *made) : NULL;
    if (!made || !service_block(fd)) {
        free(made);
        close(fd);
        return;
    }
    net_tune(fd);
    made->all = all;
    made->fd = fd;
    pthread_mutex_lock(&all->lock);
    if (pd_start(&made->thread, run_visit, made)) {
        close(fd);
        free(made);
    } else {
        made->next = all->visits;
        all->visits = made;
        all->num_visits++;
    }
    pthread_mutex_unlock(&all->lock);
}

/* Those that are over, or all of them. */
static void end_visits(service *all, bool every)
{
    visit *gone = NULL;
    pthread_mutex_lock(&all->lock);
    for (visit **at = &all->visits; *at;) {
        visit *each = *at;
        if (!every && !atomic_load(&each->over)) {
            at = &each->next;
            continue;
        }
        *at = each->next;
        each->next = gone;
        gone = each;
        all->num_visits--;
    }
    pthread_mutex_unlock(&all->lock);
    for (const visit *each = gone; each; each = each->next)
        shutdown(each->fd, SHUT_RDWR);
    while (gone) {
        visit *each = gone;
        gone = each->next;
        pthread_join(each->thread, NULL);
        close(each->fd);
        free(each);
    }
}

static void *listen_loop(void *argument)
{
    service *all = argument;
    struct pollfd wait[] = {{all->listener, POLLIN, 0}, {all->bell, POLLIN, 0}};
    while (!atomic_load(&all->stop)) {
        poll(wait, 2, -1);
        if (wait[1].revents & POLLIN)
            net_rung(all->bell);
        end_visits(all, false);
        int fd = wait[0].revents & POLLIN && !atomic_load(&all->stop) ? net_accept(all->listener, &all->spare) : -1;
        if (fd >= 0)
            begin_visit(all, fd);
    }
    return NULL;
}

service *service_open(const char *magic, const service_hooks *hooks, void *own, const pd_options *options)
{
    service *all = calloc(1, sizeof *all);
    if (!all)
        return pd_fail(ENOMEM, "no memory"), NULL;
    all->hooks = hooks;
    all->own = own;
    all->spare = net_spare();
    all->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    memcpy(all->where.magic, magic, sizeof all->where.magic);
    grants_open(&all->leases);
    pthread_mutex_init(&all->lock, NULL);
    all->listener = net_listen(options, &all->where.at);
    int error = all->listener < 0 ? -EIO : 0;
    if (!error && (all->bell < 0 || getrandom(all->where.instance, SERVICE_INSTANCE, 0) != SERVICE_INSTANCE))
        error = pd_fail(errno, "cannot make a loop: %s", strerror(errno));
    if (!error && (error = pd_start(&all->thread, listen_loop, all)))
        pd_fail(error, "cannot start a thread: %s", strerror(error));
    all->running = !error;
    if (error) {
        service_close(all);
        return NULL;
    }
    return all;
}

void service_close(service *all)
{
    atomic_store(&all->stop, true);
    if (all->running) {
        net_ring(all->bell);
        pthread_join(all->thread, NULL);
    }
    end_visits(all, true);
    if (all->listener >= 0) {
        shutdown(all->listener, SHUT_RDWR); /* also for a forked child, which would let readers wait for ever */
        close(all->listener);
    }
    if (all->spare >= 0)
        close(all->spare);
    if (all->bell >= 0)
        close(all->bell);
    grants_close(&all->leases);
    pd_release(all->memory);
    free(all->exports);
    pthread_mutex_destroy(&all->lock);
    free(all);
}
