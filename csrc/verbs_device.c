/* The library, the ports of devices that are used, and memory registered with them; see verbs.h. */

#include "verbs_library.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "dl.h"

/* --- the library -------------------------------------------------------------------------------------------------- */

verbs_library ib;

#define SYMBOL(name) {"ibv_" #name, offsetof(verbs_library, name), false}
#define NEWER(name) {"ibv_" #name, offsetof(verbs_library, name), true}

static const pd_symbol symbols[] = {
    SYMBOL(get_device_list), SYMBOL(free_device_list), SYMBOL(get_device_name), SYMBOL(open_device), SYMBOL(close_device),
    SYMBOL(query_device), SYMBOL(query_port), SYMBOL(query_gid), SYMBOL(alloc_pd), SYMBOL(dealloc_pd), SYMBOL(reg_mr),
    NEWER(reg_mr_iova2), NEWER(reg_dmabuf_mr), SYMBOL(dereg_mr), SYMBOL(create_comp_channel), SYMBOL(destroy_comp_channel),
    SYMBOL(create_cq), SYMBOL(destroy_cq), SYMBOL(get_cq_event), SYMBOL(ack_cq_events), SYMBOL(create_qp), SYMBOL(modify_qp),
    SYMBOL(destroy_qp), SYMBOL(get_async_event), SYMBOL(ack_async_event), SYMBOL(wc_status_str), NEWER(is_fork_initialized),
    SYMBOL(fork_init),
};

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;

int verbs_probe(void)
{
    pthread_mutex_lock(&opening);
    int error = 0;
    if (!ib.get_device_list) {
        verbs_library found;
        error = pd_dl_open("libibverbs.so.1", symbols, sizeof symbols / sizeof *symbols, &found);
        /* Old kernels give a forked child the very pages that a device writes to. Fails where somebody came first. */
        if (!error && (!found.is_fork_initialized || found.is_fork_initialized() != IB_FORK_UNNEEDED))
            found.fork_init();
        if (!error)
            ib = found;
    }
    pthread_mutex_unlock(&opening);
    return error;
}

/* --- rails -------------------------------------------------------------------------------------------------------- */

static void events_ready(source *self, uint32_t events)
{
    (void)events;
    rail *each = (rail *)((char *)self - offsetof(rail, events));
    ib_async_event event;
    errno = 0;
    while (!ib.get_async_event(each->context, &event)) {
        bool ours = event.event_type == IB_EVENT_DEVICE_FATAL || event.element.port_num == each->port;
        if (ours && (event.event_type == IB_EVENT_PORT_ERR || event.event_type == IB_EVENT_DEVICE_FATAL))
            atomic_store(&each->down, true);
        if (ours && event.event_type == IB_EVENT_PORT_ACTIVE)
            atomic_store(&each->down, false);
        ib.ack_async_event(&event);
        errno = 0;
    }
    if (errno && errno != EAGAIN && errno != EINTR) { /* the device is gone, and would tell so for ever */
        atomic_store(&each->down, true);
        epoll_ctl(each->verbs->epoll, EPOLL_CTL_DEL, self->fd, NULL);
    }
}

static ib_context *open_named(const char *name)
{
    int count = 0;
    ib_device **list = ib.get_device_list(&count);
    ib_context *opened = NULL;
    errno = ENODEV;
    for (int i = 0; i < count && !opened; i++)
        if (!strcmp(ib.get_device_name(list[i]), name))
            opened = ib.open_device(list[i]);
    int error = errno;
    if (list)
        ib.free_device_list(list);
    if (!opened)
        pd_fail(error, "RDMA device %s cannot be opened: %s; may this process use /dev/infiniband/uverbs*?", name,
                strerror(error));
    return opened;
}

/* Asked with a descriptor that is none of a dma-buf: who knows them says just that. */
int pd_dma_buf(const char *name)
{
    int error = verbs_probe();
    ib_context *opened = error ? NULL : open_named(name);
    if (!opened)
        return error ? error : -ENODEV;
    ib_pd *domain = ib.alloc_pd(opened);
    int file = domain ? memfd_create("pd-none", MFD_CLOEXEC) : -1;
    ib_mr *made = domain && ib.reg_dmabuf_mr ? ib.reg_dmabuf_mr(domain, 0, 4096, 0, file, IB_REMOTE_READ) : NULL;
    error = file < 0 ? pd_fail(errno, "not tried: %s", strerror(errno))
            : made || !ib.reg_dmabuf_mr || errno == EOPNOTSUPP || errno == ENOSYS
                ? pd_fail(EOPNOTSUPP, "%s takes no dma-bufs", ib.reg_dmabuf_mr ? "its driver" : "this libibverbs") : 0;
    if (made)
        ib.dereg_mr(made);
    if (file >= 0)
        close(file);
    if (domain)
        ib.dealloc_pd(domain);
    ib.close_device(opened);
    return error;
}

static int look_at(rail *each, verbs_port *port)
{
    ib_device_attr device;
    ib_port_attr found;
    ib_gid gid;
    memset(&found, 0, sizeof found);
    if (ib.query_device(each->context, &device) || ib.query_port(each->context, each->port, &found) ||
        ib.query_gid(each->context, each->port, each->gid_index, &gid))
        return pd_fail(EIO, "%s does not say what it can do: is there a port %u with GID index %u?", each->name, each->port,
                       each->gid_index);
    const verbs_settings *settings = &each->verbs->settings;
    each->link_layer = found.link_layer;
    each->max_mr = device.max_mr_size;
    each->max_requests = device.max_qp_wr;
    each->max_completions = device.max_cqe;
    each->reads_out = device.max_qp_init_rd_atom < (int)settings->max_reads ? device.max_qp_init_rd_atom : (int)settings->max_reads;
    each->reads_in = device.max_qp_rd_atom < 255 ? device.max_qp_rd_atom : 255;
    each->down = found.state != IB_PORT_ACTIVE;
    *port = (verbs_port){.lid = found.lid, .link_layer = found.link_layer};
    memcpy(port->gid, gid.raw, sizeof port->gid);
    return each->reads_out > 0 && each->reads_in > 0 ? 0 : pd_fail(ENOTSUP, "%s cannot do RDMA READ", each->name);
}

static int unblock(int fd)
{
    return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static int rail_open(rail *each, verbs_port *port)
{
    size_t bytes = VERBS_SCRATCH * VERBS_INSTANCE;
    each->context = open_named(each->verbs->settings.rails[each->index].device);
    if (!each->context)
        return -ENODEV;
    int error = look_at(each, port);
    if (error)
        return error;
    each->pd = ib.alloc_pd(each->context);
    each->channel = each->pd ? ib.create_comp_channel(each->context) : NULL;
    if (!each->channel || unblock(each->channel->fd) || unblock(each->context->async_fd))
        return pd_fail(errno, "%s: %s", each->name, strerror(errno));
    each->scratch = mmap(NULL, bytes + VERBS_INSTANCE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (each->scratch == MAP_FAILED)
        return each->scratch = NULL, pd_fail(errno, "no memory");
    each->token = each->scratch + bytes;
    memcpy(each->token, each->verbs->where.instance, VERBS_INSTANCE);
    each->scratch_mr = ib.reg_mr(each->pd, each->scratch, bytes, IB_LOCAL_WRITE);
    each->token_mr = each->scratch_mr ? ib.reg_mr(each->pd, each->token, VERBS_INSTANCE, IB_REMOTE_READ) : NULL;
    if (!each->token_mr)
        return pd_fail(errno, "%s registers no memory: %s", each->name, strerror(errno));
    each->completions = (source){rail_completions, each->channel->fd};
    each->events = (source){events_ready, each->context->async_fd};
    net_watch(each->verbs->epoll, &each->completions, false, false);
    net_watch(each->verbs->epoll, &each->events, false, false);
    return 0;
}

int rails_open(verbs *all)
{
    const verbs_settings *settings = &all->settings;
    int error = verbs_probe();
    if (error)
        return error;
    if (!settings->num_rails || settings->num_rails > VERBS_RAILS)
        return pd_fail(EINVAL, "%u ports of RDMA devices: 1 to %d can be used", settings->num_rails, VERBS_RAILS);
    all->rails = calloc(settings->num_rails, sizeof *all->rails);
    if (!all->rails)
        return pd_fail(ENOMEM, "no memory");
    for (; !error && all->num_rails < (int)settings->num_rails; all->num_rails++) {
        rail *each = &all->rails[all->num_rails];
        each->verbs = all;
        each->index = all->num_rails;
        each->port = (uint8_t)settings->rails[each->index].port;
        each->gid_index = (uint8_t)settings->rails[each->index].gid_index;
        each->completions.fd = each->events.fd = -1;
        snprintf(each->name, sizeof each->name, "%.63s:%u", settings->rails[each->index].device, each->port);
        error = rail_open(each, &all->where.rails[each->index]);
    }
    all->where.num_rails = settings->num_rails;
    return error;
}

/* After everything that was made of them. */
void rails_close(verbs *all)
{
    for (int i = 0; i < all->num_rails; i++) {
        rail *each = &all->rails[i];
        if (each->token_mr)
            ib.dereg_mr(each->token_mr);
        if (each->scratch_mr)
            ib.dereg_mr(each->scratch_mr);
        if (each->scratch)
            munmap(each->scratch, (VERBS_SCRATCH + 1) * VERBS_INSTANCE);
        if (each->channel)
            ib.destroy_comp_channel(each->channel);
        if (each->pd)
            ib.dealloc_pd(each->pd);
        if (each->context)
            ib.close_device(each->context);
    }
    free(all->rails);
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

void keys_release(keys *each)
{
    if (!each || atomic_fetch_sub(&each->refs, 1) != 1)
        return;
    for (size_t i = 0; each->mrs && i < each->num_rails * each->num_chunks; i++)
        if (each->mrs[i])
            ib.dereg_mr(each->mrs[i]);
    pd_release(each->memory);
    free(each->mrs);
    free(each->first);
    free(each->sorted);
    free(each);
}

keys *keys_hold(verbs *all)
{
    pthread_mutex_lock(&all->lock);
    keys *held = all->keys;
    if (held)
        atomic_fetch_add(&held->refs, 1);
    pthread_mutex_unlock(&all->lock);
    return held;
}

static ib_mr *pinned(const rail *on, uint64_t at, uint64_t bytes, int access)
{
    void *start = (void *)(uintptr_t)at;
    ib_mr *made = NULL;
    /* An optional right: iova2 leaves it away where the kernel does not know it. */
    if (on->verbs->settings.relaxed && ib.reg_mr_iova2)
        made = ib.reg_mr_iova2(on->pd, start, bytes, at, (unsigned)access | IB_RELAXED_ORDERING);
    return made ? made : ib.reg_mr(on->pd, start, bytes, access);
}

/* `dma_buf`: why it is not registered as one; "": nobody tried. */
static int refuse(const rail *on, const pd_region *region, const char *dma_buf, int plain)
{
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    unsigned long long bytes = region->length, most = limit.rlim_cur;
    if (*dma_buf)
        return pd_fail(plain, "%s cannot register device memory: as a dma-buf: %.60s; by its address: %s (is its vendor's "
                       "peer-memory module loaded?); stage it through host memory", on->name, dma_buf, strerror(plain));
    if (plain == ENOMEM && limit.rlim_cur != RLIM_INFINITY)
        return pd_fail(plain, "%s cannot register %llu bytes: %s: %llu KiB may be locked: ulimit -l unlimited (docker: "
                       "--ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)", on->name, bytes, strerror(plain), most >> 10);
    return pd_fail(plain, "%s cannot register %llu bytes: %s", on->name, bytes, strerror(plain));
}

/* A part of a region with one device, in the best way that it takes. NULL after pd_fail. */
static ib_mr *enrol(const rail *on, const pd_region *region, uint64_t offset, uint64_t bytes, const char *dma_buf)
{
    const verbs_settings *settings = &on->verbs->settings;
    uint64_t at = region->address + offset;
    int access = IB_REMOTE_READ;
    if (!(region->flags & PD_READ_ONLY))
        access |= IB_LOCAL_WRITE | (settings->write ? IB_REMOTE_WRITE : 0);
    ib_mr *made = NULL;
    if (region->flags & PD_DMA_BUF) {
        errno = EOPNOTSUPP;
        if (ib.reg_dmabuf_mr)
            made = ib.reg_dmabuf_mr(on->pd, region->fd_offset + offset, bytes, at, region->fd, access);
        dma_buf = strerror(errno);
        atomic_fetch_add(&on->verbs->counts.dma_bufs, made != NULL);
    } else if (settings->on_demand && !(region->flags & PD_OF_DEVICE)) {
        made = ib.reg_mr(on->pd, (void *)(uintptr_t)at, bytes, access | IB_ON_DEMAND);
        atomic_fetch_add(&on->verbs->counts.on_demand, made != NULL);
    }
    if (!made)
        made = pinned(on, at, bytes, access);
    if (!made)
        refuse(on, region, dma_buf, errno);
    return made;
}

/* A region with one device; a GPU's has no descriptor yet. False after pd_fail. */
static bool enrol_all(const rail *on, const pd_region *region, uint64_t chunk, ib_mr **out)
{
    pd_region named = *region;
    char why_not[PD_MAX_WORDS] = "";
    int file = -1;
    if ((region->flags & (PD_OF_DEVICE | PD_DMA_BUF)) == PD_OF_DEVICE) {
        named.fd = file = gpu_dma_buf(on->verbs, region, &named.fd_offset);
        named.flags |= file >= 0 ? PD_DMA_BUF : 0;
        if (file < 0)
            memcpy(why_not, pd_last_error(), sizeof why_not);
    }
    bool fine = true;
    for (uint64_t offset = 0; fine && offset < region->length; offset += chunk, out++) {
        uint64_t rest = region->length - offset;
        *out = enrol(on, &named, offset, rest < chunk ? rest : chunk, why_not);
        fine = *out;
    }
    if (file >= 0)
        close(file); /* whoever took it has it for as long as the registration lasts */
    return fine;
}

static int by_address(const void *left, const void *right, void *memory)
{
    const pd_region *regions = ((const pd_memory *)memory)->regions;
    uint64_t a = regions[*(const size_t *)left].address, b = regions[*(const size_t *)right].address;
    return (a > b) - (a < b);
}

static uint64_t chunk_of(const verbs *all)
{
    uint64_t most = all->settings.max_mr_bytes ? all->settings.max_mr_bytes : UINT64_MAX;
    for (int i = 0; i < all->num_rails; i++)
        most = all->rails[i].max_mr && all->rails[i].max_mr < most ? all->rails[i].max_mr : most;
    uint64_t huge = 2 << 20, page = 4096; /* a page belongs to one chunk */
    most = most < 1ull << 62 ? most : 1ull << 62;
    return most >= huge ? most / huge * huge : most >= page ? most / page * page : page;
}

static bool lay_out(keys *made)
{
    const pd_memory *memory = made->memory;
    made->first = calloc(memory->num_regions + 1, sizeof *made->first);
    made->sorted = calloc(memory->num_regions + 1, sizeof *made->sorted);
    if (!made->first || !made->sorted)
        return false;
    for (size_t i = 0; i < memory->num_regions; i++) {
        made->first[i] = made->num_chunks;
        made->sorted[i] = i;
        made->num_chunks += (memory->regions[i].length - 1) / made->chunk + 1;
    }
    qsort_r(made->sorted, memory->num_regions, sizeof *made->sorted, by_address, made->memory);
    made->mrs = calloc(made->num_rails * made->num_chunks + 1, sizeof(ib_mr *));
    return made->mrs;
}

keys *keys_make(verbs *all, pd_memory *memory)
{
    keys *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory"), NULL;
    atomic_init(&made->refs, 1);
    pd_retain(made->memory = memory);
    made->num_rails = (size_t)all->num_rails;
    made->chunk = chunk_of(all);
    if (!lay_out(made)) {
        keys_release(made);
        return pd_fail(ENOMEM, "no memory for keys"), NULL;
    }
    for (size_t r = 0; r < made->num_rails; r++)
        for (size_t i = 0; i < memory->num_regions; i++)
            if (!enrol_all(&all->rails[r], &memory->regions[i], made->chunk, &made->mrs[r * made->num_chunks + made->first[i]])) {
                keys_release(made);
                return NULL;
            }
    return made;
}

const ib_mr *keys_find(const keys *each, int index, uint64_t at, uint64_t *bytes)
{
    size_t low = 0, high = each->memory->num_regions;
    while (low < high) { /* behind the last region that starts at or before it */
        size_t middle = (low + high) / 2;
        if (each->memory->regions[each->sorted[middle]].address <= at)
            low = middle + 1;
        else
            high = middle;
    }
    while (low--) { /* a region may lie in another one */
        size_t region = each->sorted[low];
        uint64_t inside = at - each->memory->regions[region].address, length = each->memory->regions[region].length;
        if (inside >= length)
            continue;
        uint64_t rest = each->chunk - inside % each->chunk;
        rest = rest < length - inside ? rest : length - inside;
        *bytes = *bytes < rest ? *bytes : rest;
        return each->mrs[(size_t)index * each->num_chunks + each->first[region] + inside / each->chunk];
    }
    return NULL;
}

const ib_mr *destination_find(const verbs *all, const keys *each, int index, uint64_t at, uint64_t *bytes)
{
    const ib_mr *found = keys_find(each, index, at, bytes);
    for (const buffer *one = all->buffers; one && !found; one = one->next) {
        uint64_t inside = at - (uintptr_t)one->bytes;
        if (inside >= PD_SLICE_BYTES)
            continue;
        *bytes = *bytes < PD_SLICE_BYTES - inside ? *bytes : PD_SLICE_BYTES - inside;
        found = one->mrs[index];
    }
    return found;
}

static void buffer_free(verbs *all, buffer *gone)
{
    for (int i = 0; i < all->num_rails; i++)
        if (gone->mrs[i])
            ib.dereg_mr(gone->mrs[i]);
    if (gone->bytes != MAP_FAILED && gpu_unpin(all, gone))
        munmap(gone->bytes, PD_SLICE_BYTES);
    free(gone);
}

/* As many as slices of short runs are in flight at once. */
unsigned char *buffer_make(void *own)
{
    verbs *all = own;
    buffer *made = calloc(1, sizeof *made);
    if (!made)
        return NULL;
    made->bytes = mmap(NULL, PD_SLICE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool whole = made->bytes != MAP_FAILED;
    int access = IB_LOCAL_WRITE | (all->settings.write ? IB_REMOTE_WRITE : 0);
    for (int i = 0; i < all->num_rails && whole; i++)
        whole = (made->mrs[i] = pinned(&all->rails[i], (uintptr_t)made->bytes, PD_SLICE_BYTES, access));
    if (!whole)
        return buffer_free(all, made), NULL;
    made->next = all->buffers;
    all->buffers = made;
    return made->bytes;
}

void buffers_free(verbs *all)
{
    for (buffer *gone; (gone = all->buffers);) {
        all->buffers = gone->next;
        buffer_free(all, gone);
    }
}
