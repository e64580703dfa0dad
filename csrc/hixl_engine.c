/* See hixl_engine.h. */

#include "hixl_engine.h"

#include "dl.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- the libraries ------------------------------------------------------------------------------------------------ */

static const hixl_calls *calls; /* of hixl.cc, once everything is there */

#define HIXL "_ZN4hixl4Hixl"
#define STRING "RKN2ge12AscendStringE"
#define FOUND(name, field) {name, offsetof(hixl_symbols, field), false}

/* Ordinary functions of C++ have the same names whatever its library's string is. */
static const pd_symbol strings[] = {
    FOUND("_ZN2ge12AscendStringC1EPKc", string),
    FOUND("_ZNK2ge12AscendStringltERKS0_", string_less),
};
static const pd_symbol methods[] = {
    FOUND(HIXL "C1Ev", make),
    FOUND(HIXL "D1Ev", unmake),
    FOUND(HIXL "10InitializeERKN2ge12AscendStringERKSt3mapIS2_S2_St4lessIS2_ESaISt4pairIS3_S2_EEE", initialize),
    FOUND(HIXL "8FinalizeEv", finalize),
    FOUND(HIXL "11RegisterMemERKNS_7MemDescENS_7MemTypeERPv", register_memory),
    FOUND(HIXL "13DeregisterMemEPv", deregister_memory),
    FOUND(HIXL "7ConnectERKN2ge12AscendStringEi", connect),
    FOUND(HIXL "10DisconnectERKN2ge12AscendStringEi", disconnect),
    FOUND(HIXL "12TransferSyncERKN2ge12AscendStringENS_10TransferOpERKSt6vectorINS_14TransferOpDescESaIS7_EEi", transfer),
};

/* hixl.cc's module lies beside the one that this is part of. */
static int open_boundary(const hixl_calls **out)
{
    Dl_info here;
    char path[4096];
    const char *slash = dladdr((const void *)&calls, &here) ? strrchr(here.dli_fname, '/') : NULL;
    int folder = slash ? (int)(slash - here.dli_fname) : 1;
    snprintf(path, sizeof path, "%.*s/_hixl.abi3.so", folder, slash ? here.dli_fname : ".");
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    *out = module ? dlsym(module, "pd_hixl_calls") : NULL;
    return *out ? 0 : pd_fail(ENOENT, "pd_connector was built without its HIXL module: it needs a C++ compiler (%.80s)", dlerror());
}

int hixl_probe(void)
{
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&opening);
    int error = 0;
    if (!calls) {
        hixl_symbols found;
        const hixl_calls *made = NULL;
        error = acl_load();
        if (!error)
            error = pd_dl_open("libmetadef.so", strings, sizeof strings / sizeof *strings, &found);
        if (!error)
            error = pd_dl_open("libcann_hixl.so", methods, sizeof methods / sizeof *methods, &found);
        if (!error)
            error = open_boundary(&made);
        if (!error) {
            made->bind(&found);
            calls = made;
        }
    }
    pthread_mutex_unlock(&opening);
    return error;
}

static int failed(const char *what, uint32_t status)
{
    const char *words = "see HIXL's status codes";
    switch (status) {
    case HIXL_PARAM_INVALID: words = "an address that is not registered, or a wrong argument"; break;
    case HIXL_TIMEOUT: words = "no answer in time: is the peer alive, do its and our NPUs see each other (hccn_tool -ping)?"; break;
    case HIXL_NOT_CONNECTED: words = "there is no link"; break;
    case HIXL_ALREADY_CONNECTED: words = "there is a link already"; break;
    case HIXL_RESOURCE_EXHAUSTED: words = "too many registrations or links, or more than 50 GB of device memory"; break;
    case HIXL_FAILED: words = "see the plog in ~/ascend/log; same host over RoCE needs HCCL_INTRA_ROCE_ENABLE=1"; break;
    case HIXL_THREW: words = "it threw an exception"; break;
    }
    return pd_fail(EIO, "%s: HIXL status %u (%s)", what, status, words);
}

/* --- the engine --------------------------------------------------------------------------------------------------- */

/* An engine listens at a port of our choosing, which peers are told before it starts: kept until then. */
static int choose_name(hixl_engine *each, const char *host)
{
    net_address at;
    pd_options any = {.host = host, .advertise = host};
    int fd = net_listen(&any, &at);
    if (fd < 0)
        return fd;
    each->held = fd;
    snprintf(each->name, sizeof each->name, at.family == 6 ? "[%s]:%u" : "%s:%u", host, at.port);
    return 0;
}

int hixl_engine_open(hixl_engine *out, pd_transport *core, const pd_options *options)
{
    if (options->settings_bytes != sizeof out->settings)
        return pd_fail(EINVAL, "settings of another version");
    memcpy(&out->settings, options->settings, sizeof out->settings);
    out->core = core;
    pthread_mutex_init(&out->lock, NULL);
    pthread_cond_init(&out->changed, NULL);
    out->threads = options->threads;
    return choose_name(out, options->advertise);
}

static int start(hixl_engine *each, int device)
{
    each->context = acl_context(device);
    each->device = device;
    if (!each->context)
        return -EIO;
    if (!each->scratch.buffers && acl_scratch_open(&each->scratch, each->core, each->context, each->threads))
        return -ENOMEM;
    void *made = calls->make();
    if (!made)
        return failed("no engine can be made", HIXL_THREW);
    if (each->held >= 0)
        close(each->held);
    each->held = -1;
    uint32_t status = calls->initialize(made, each->name, each->settings.buffer_pool);
    if (status != HIXL_SUCCESS) {
        calls->unmake(made);
        return failed("the engine does not start", status);
    }
    each->handle = made;
    return 0;
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

static int by_address(const void *left, const void *right)
{
    uint64_t a = ((const hixl_memory *)left)->address, b = ((const hixl_memory *)right)->address;
    return (a > b) - (a < b);
}

/* What to register for a set of regions, besides the buffers: neighbours as one. Negative after pd_fail. */
static int merge(const pd_memory *memory, hixl_memory *out, size_t *count)
{
    hixl_memory *all = calloc(memory->num_regions + 1, sizeof *all);
    if (!all)
        return pd_fail(ENOMEM, "no memory");
    int error = 0;
    for (size_t i = 0; i < memory->num_regions; i++) {
        const pd_region *region = &memory->regions[i];
        all[i] = (hixl_memory){region->address, region->length, !(region->flags & PD_OF_DEVICE), NULL};
    }
    qsort(all, memory->num_regions, sizeof *all, by_address);
    *count = 0;
    for (size_t i = 0; i < memory->num_regions && !error; i++) {
        hixl_memory *last = *count ? &out[*count - 1] : NULL;
        if (last && last->on_host == all[i].on_host && last->address + last->bytes >= all[i].address) {
            uint64_t end = all[i].address + all[i].bytes;
            last->bytes = end > last->address + last->bytes ? end - last->address : last->bytes;
        } else if (*count < HIXL_MAX_REGIONS - 1) {
            out[(*count)++] = all[i];
        } else {
            error = pd_fail(ENOSPC, "more than %d pieces of memory, which is all that HIXL registers: let the engine keep its KV "
                            "cache in fewer tensors", HIXL_MAX_REGIONS - 1);
        }
    }
    free(all);
    return error;
}

static bool same(const hixl_memory *left, const hixl_memory *right)
{
    return left->address == right->address && left->bytes == right->bytes && left->on_host == right->on_host;
}

/* Under the lock. */
static int exchange(hixl_engine *each, hixl_memory *wanted, size_t count)
{
    for (size_t i = 0; i < each->num_memory; i++) {
        size_t k = 0;
        while (k < count && !same(&wanted[k], &each->memory[i]))
            k++;
        if (k < count)
            wanted[k].handle = each->memory[i].handle;
        else
            calls->delist(each->handle, each->memory[i].handle); /* what it still knows then is refused with the rest below */
    }
    uint32_t status = HIXL_SUCCESS;
    size_t failed_at = 0;
    each->num_memory = 0;
    for (size_t i = 0; i < count; i++) {
        if (!wanted[i].handle && status == HIXL_SUCCESS) {
            status = calls->enlist(each->handle, wanted[i].address, wanted[i].bytes, wanted[i].on_host, &wanted[i].handle);
            failed_at = i;
        }
        if (wanted[i].handle && (status == HIXL_SUCCESS || i != failed_at))
            each->memory[each->num_memory++] = wanted[i];
    }
    each->generation++;
    if (status == HIXL_SUCCESS)
        return 0;
    char what[96];
    snprintf(what, sizeof what, "%llu bytes of %s memory are not registered", (unsigned long long)wanted[failed_at].bytes,
             wanted[failed_at].on_host ? "host" : "device");
    return failed(what, status);
}

int hixl_engine_publish(hixl_engine *each, const pd_memory *memory)
{
    hixl_memory wanted[HIXL_MAX_REGIONS];
    size_t count = 0;
    int device = -1, error = merge(memory, wanted, &count);
    if (error)
        return error;
    pthread_mutex_lock(&each->lock);
    error = acl_device_of_all(memory, each->handle ? each->device : -1, &device);
    if (!error && !each->handle && count)
        error = start(each, device >= 0 ? device : each->settings.device >= 0 ? each->settings.device : 0);
    else if (!error && each->handle)
        error = acl_enter(each->context);
    if (!error && each->handle) {
        wanted[count] = (hixl_memory){(uintptr_t)each->scratch.buffers, each->scratch.count * PD_MAX_SLICE_BYTES, 0, NULL};
        error = exchange(each, wanted, count + 1);
    }
    pthread_mutex_unlock(&each->lock);
    return error;
}

/* --- links -------------------------------------------------------------------------------------------------------- */

struct hixl_link {
    hixl_link *next;
    int refs, users;
    hixl_where owner;
    uint64_t ours, theirs; /* generations of memory that it knows */
    bool up; /* for all that is known: down only when HIXL said so */
    bool changing; /* a thread is making it anew, or taking it down for good */
    bool broken; /* nothing is begun any more */
    bool settling, settled; /* nothing writes any more once it is settled */
};

hixl_link *hixl_link_get(hixl_engine *each, const hixl_where *owner)
{
    pthread_mutex_lock(&each->lock);
    hixl_link *found = each->links;
    while (found && (found->broken || !found->refs || memcmp(&found->owner, owner, sizeof *owner)))
        found = found->next;
    if (!found && (found = calloc(1, sizeof *found))) {
        found->owner = *owner;
        found->next = each->links;
        each->links = found;
    }
    if (found)
        found->refs++;
    else
        pd_fail(ENOMEM, "no memory for a link");
    pthread_mutex_unlock(&each->lock);
    return found;
}

/* Under the lock, which is given away meanwhile. */
static uint32_t take_down(hixl_engine *each, hixl_link *link)
{
    pthread_mutex_unlock(&each->lock);
    uint32_t status = calls->unlink(each->handle, link->owner.engine, (int)each->settings.link_ms);
    pthread_mutex_lock(&each->lock);
    return status == HIXL_NOT_CONNECTED ? HIXL_SUCCESS : status;
}

void hixl_link_put(hixl_engine *each, hixl_link *link)
{
    pthread_mutex_lock(&each->lock);
    if (!--link->refs) {
        /* An agent that closes ends the whole engine; a peer that is gone would cost it a time-out each. */
        if (link->up && !pd_closing(each->core) && !acl_enter(each->context))
            take_down(each, link);
        hixl_link **at = &each->links;
        while (*at != link)
            at = &(*at)->next;
        *at = link->next;
        free(link);
        pthread_cond_broadcast(&each->changed);
    }
    pthread_mutex_unlock(&each->lock);
}

/* Nothing writes over a link any more once it is down. While it cannot be taken down we stay here, for our reads' memory must
 * not be used again; when the agent closes, the whole engine ends, and that settles it. Under the lock. */
static void settle(hixl_engine *each, hixl_link *link)
{
    link->broken = true;
    pthread_cond_broadcast(&each->changed);
    if (link->settling) {
        while (!link->settled)
            pthread_cond_wait(&each->changed, &each->lock);
        return;
    }
    link->settling = true;
    while (link->changing)
        pthread_cond_wait(&each->changed, &each->lock);
    while (take_down(each, link) != HIXL_SUCCESS) {
        pthread_mutex_unlock(&each->lock);
        bool closing = pd_closing(each->core);
        if (closing)
            calls->finalize(each->handle);
        else
            usleep(200 * 1000);
        pthread_mutex_lock(&each->lock);
        if (closing)
            break;
    }
    link->settled = true;
    link->up = false;
    pthread_cond_broadcast(&each->changed);
}

/* HIXL knows one link per engine: an older one to the same engine, that is not down yet, would be taken for this one. */
static bool in_the_way(const hixl_engine *each, const hixl_link *link)
{
    for (const hixl_link *other = each->links; other; other = other->next)
        if (other != link && other->up && !strcmp(other->owner.engine, link->owner.engine))
            return true;
    return false;
}

/* Under the lock, which is given away meanwhile; no read is under way over the link. */
static uint32_t make_anew(hixl_engine *each, hixl_link *link, uint64_t theirs)
{
    uint64_t ours = each->generation;
    uint32_t status = link->up ? take_down(each, link) : HIXL_SUCCESS;
    for (int i = 0; i < 2 && status == HIXL_SUCCESS; i++) {
        pthread_mutex_unlock(&each->lock);
        status = calls->link(each->handle, link->owner.engine, (int)each->settings.link_ms);
        pthread_mutex_lock(&each->lock);
        if (status != HIXL_ALREADY_CONNECTED || i)
            break;
        status = take_down(each, link); /* left over from one that HIXL did not take down when it was told to */
    }
    link->up = status == HIXL_SUCCESS;
    link->ours = ours, link->theirs = theirs;
    return status;
}

/* The link is up and knows the memory of both sides as it is now. Under the lock. False after pd_fail. */
static bool enter(hixl_engine *each, hixl_link *link, uint64_t theirs)
{
    while (!link->broken && (link->changing || (!link->up && in_the_way(each, link))))
        pthread_cond_wait(&each->changed, &each->lock);
    if (!link->broken && (!link->up || link->ours != each->generation || link->theirs != theirs)) {
        link->changing = true;
        while (link->users && !link->broken)
            pthread_cond_wait(&each->changed, &each->lock);
        uint32_t status = link->broken ? HIXL_SUCCESS : make_anew(each, link, theirs);
        link->changing = false;
        pthread_cond_broadcast(&each->changed);
        if (status != HIXL_SUCCESS)
            return failed("no link", status), false;
    }
    if (link->broken)
        return pd_fail(EPIPE, "its link was lost"), false;
    link->users++;
    return true;
}

static void leave(hixl_engine *each, hixl_link *link)
{
    link->users--;
    pthread_cond_broadcast(&each->changed);
}

bool hixl_link_try(hixl_engine *each, hixl_link *link, uint64_t generation)
{
    pthread_mutex_lock(&each->lock);
    bool made = !each->handle || (!acl_enter(each->context) && enter(each, link, generation));
    if (made && each->handle)
        leave(each, link);
    pthread_mutex_unlock(&each->lock);
    return made;
}

pd_status hixl_link_read(hixl_engine *each, hixl_link *link, uint64_t generation, const hixl_op *ops, size_t count)
{
    if (acl_enter(each->context))
        return PD_ERROR;
    pthread_mutex_lock(&each->lock);
    bool entered = enter(each, link, generation);
    pthread_mutex_unlock(&each->lock);
    if (!entered)
        return PD_PEER_LOST;
    uint32_t status = calls->read(each->handle, link->owner.engine, ops, count, (int)each->settings.transfer_ms);
    pthread_mutex_lock(&each->lock);
    leave(each, link);
    bool whole = status == HIXL_SUCCESS;
    /* These were refused before anything moved; after any other end something may still come. */
    bool refused = status == HIXL_PARAM_INVALID || status == HIXL_RESOURCE_EXHAUSTED;
    if (!whole && !refused)
        settle(each, link);
    pthread_mutex_unlock(&each->lock);
    if (!whole)
        failed("the read failed", status);
    return whole ? PD_DONE : refused ? PD_ERROR : PD_PEER_LOST;
}

void hixl_engine_close(hixl_engine *each)
{
    if (each->held >= 0)
        close(each->held);
    if (each->handle && !acl_enter(each->context)) {
        calls->finalize(each->handle);
        calls->unmake(each->handle);
    }
    acl_scratch_close(&each->scratch);
    pthread_mutex_destroy(&each->lock);
    pthread_cond_destroy(&each->changed);
}
