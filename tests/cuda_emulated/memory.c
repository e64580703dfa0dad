/* Device memory, pinned memory, and handles by which other processes open device memory; see cuda_emu.h. */

#include "cuda_emu.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

/* A small allocation begins somewhere in a larger block of the driver's, not on a page. */
enum { PAGE = 4096, SHIFT = 256 };
static const char MAGIC[8] = "EMUCUDA";

typedef enum { DEVICE, IMPORTED, HOST } kind;

typedef struct { /* what a handle holds */
    char magic[8];
    uint64_t serial, bytes;
    int pid, fd, device;
} told;

typedef struct region {
    struct region *next;
    kind kind;
    cuda_pointer start;
    size_t bytes, mapped;
    unsigned char *alias; /* of `start`; a HOST's is itself */
    int device, fd;
    uint64_t serial; /* 0: of memory that cannot be exported */
    unsigned refs;
} region;

static region *regions;
static bool exportable = true, by_address;
/* Written by what changes the map, read for as long as a copy takes: nothing is unmapped under a copy. */
static pthread_rwlock_t guard = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

/* Memory from now on is of a kind that other processes cannot open, as of expandable segments. */
EMU_API void emu_exportable(int yes)
{
    exportable = yes;
}

/* Others may find device memory by its address, as RDMA devices do with a peer-memory module; or nobody any more, but
 * those that pinned it have it. */
EMU_API void emu_peer_memory(int yes)
{
    by_address = yes;
    pthread_rwlock_rdlock(&guard);
    for (const region *each = regions; each; each = each->next)
        if (each->mapped)
            mprotect((void *)(uintptr_t)(each->start - SHIFT), each->mapped, yes ? PROT_READ | PROT_WRITE : PROT_NONE);
    pthread_rwlock_unlock(&guard);
}

void emu_memory_forked(void)
{
    pthread_rwlock_init(&guard, NULL);
    regions = NULL;
}

static region *at_(cuda_pointer at)
{
    for (region *each = regions; each; each = each->next)
        if (at - each->start < each->bytes)
            return each;
    return NULL;
}

/* Map a memfd twice: for the device, where nobody may touch it, and for the emulation. */
static region *map(int fd, size_t bytes)
{
    region *made = calloc(1, sizeof *made);
    size_t mapped = (bytes + SHIFT + PAGE - 1) / PAGE * PAGE;
    void *there = mmap(NULL, mapped, by_address ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_SHARED, fd, 0);
    void *alias = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (made && there != MAP_FAILED && alias != MAP_FAILED) {
        *made = (region){.start = (uintptr_t)there + SHIFT, .bytes = bytes, .mapped = mapped,
                         .alias = (unsigned char *)alias + SHIFT, .fd = -1, .refs = 1};
        return made;
    }
    if (there != MAP_FAILED)
        munmap(there, mapped);
    if (alias != MAP_FAILED)
        munmap(alias, mapped);
    free(made);
    return NULL;
}

static void unmap(region *gone)
{
    if (gone->mapped) {
        munmap((void *)(uintptr_t)(gone->start - SHIFT), gone->mapped);
        munmap(gone->alias - SHIFT, gone->mapped);
    }
    if (gone->fd >= 0)
        close(gone->fd);
    free(gone);
}

static void add(region *made)
{
    pthread_rwlock_wrlock(&guard);
    made->next = regions;
    regions = made;
    pthread_rwlock_unlock(&guard);
}

/* What begins there and is of a kind, out of the list once nobody has it; false: there is none. */
static bool drop(cuda_pointer start, kind which)
{
    region *gone = NULL;
    pthread_rwlock_wrlock(&guard);
    region **link = &regions;
    while (*link && ((*link)->start != start || (*link)->kind != which))
        link = &(*link)->next;
    bool found = *link;
    if (found && !--(*link)->refs) {
        gone = *link;
        *link = gone->next;
    }
    pthread_rwlock_unlock(&guard);
    if (gone)
        unmap(gone);
    return found;
}

cuda_error memory_make(int device, size_t bytes, cuda_pointer *out)
{
    int fd = memfd_create("cuda_emulated", MFD_CLOEXEC);
    region *made = NULL;
    if (fd >= 0 && !ftruncate(fd, (off_t)((bytes + SHIFT + PAGE - 1) / PAGE * PAGE)))
        made = map(fd, bytes);
    if (!made) {
        close(fd);
        return NO_MEMORY;
    }
    made->kind = DEVICE, made->device = device, made->fd = fd;
    if (exportable)
        while (!made->serial)
            if (getrandom(&made->serial, sizeof made->serial, 0) < 0)
                break;
    *out = made->start;
    add(made);
    count(ALLOCATIONS, 1);
    return 0;
}

cuda_error memory_free(cuda_pointer at)
{
    if (!drop(at, DEVICE))
        return BAD_VALUE;
    count(ALLOCATIONS, -1);
    return 0;
}

cuda_error memory_pin(void *at, size_t bytes)
{
    cuda_pointer start = (uintptr_t)at;
    region *made = calloc(1, sizeof *made);
    if (!made)
        return NO_MEMORY;
    *made = (region){.kind = HOST, .start = start, .bytes = bytes, .alias = at, .device = -1, .fd = -1, .refs = 1};
    pthread_rwlock_rdlock(&guard);
    bool overlaps = false;
    for (const region *each = regions; each; each = each->next)
        overlaps |= start < each->start + each->bytes && each->start < start + bytes;
    pthread_rwlock_unlock(&guard);
    if (overlaps) {
        free(made);
        return REGISTERED_ALREADY;
    }
    add(made);
    count(PINNED, 1);
    return 0;
}

cuda_error memory_unpin(void *at)
{
    if (!drop((uintptr_t)at, HOST))
        return NOT_REGISTERED;
    count(PINNED, -1);
    return 0;
}

/* --- between processes -------------------------------------------------------------------------------------------- */

cuda_error memory_export(cuda_pointer base, ipc_handle *out)
{
    told what = {.pid = getpid()};
    pthread_rwlock_rdlock(&guard);
    const region *found = at_(base);
    bool fine = found && found->start == base && found->kind == DEVICE && found->serial;
    if (fine) {
        memcpy(what.magic, MAGIC, sizeof what.magic);
        what.serial = found->serial, what.bytes = found->bytes;
        what.fd = found->fd, what.device = found->device;
    }
    pthread_rwlock_unlock(&guard);
    memset(out, 0, sizeof *out);
    memcpy(out->bytes, &what, sizeof what);
    return fine ? 0 : BAD_VALUE;
}

/* The same again while it is open, as drivers since CUDA 11 do; their own process's nobody may open. */
cuda_error memory_open(const ipc_handle *handle, int device, cuda_pointer *out)
{
    told what;
    char path[64];
    struct stat status;
    memcpy(&what, handle->bytes, sizeof what);
    if (memcmp(what.magic, MAGIC, sizeof what.magic))
        return BAD_VALUE;
    if (what.pid == getpid())
        return NO_CONTEXT;
    if (!can_access(device, what.device))
        return NO_PEER;
    pthread_rwlock_wrlock(&guard);
    region *found = regions;
    while (found && (found->kind != IMPORTED || found->serial != what.serial))
        found = found->next;
    if (found)
        *out = found->start, found->refs++;
    pthread_rwlock_unlock(&guard);
    if (found)
        return 0;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", what.pid, what.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    region *made = NULL;
    if (fd >= 0 && !fstat(fd, &status) && S_ISREG(status.st_mode) && (uint64_t)status.st_size >= what.bytes + SHIFT)
        made = map(fd, what.bytes);
    if (fd >= 0)
        close(fd);
    if (!made)
        return BAD_HANDLE;
    made->kind = IMPORTED, made->device = what.device, made->serial = what.serial;
    *out = made->start;
    add(made);
    count(OPENED, 1);
    return 0;
}

cuda_error memory_close(cuda_pointer at)
{
    pthread_rwlock_rdlock(&guard);
    const region *found = at_(at);
    bool last = found && found->refs == 1;
    pthread_rwlock_unlock(&guard);
    if (!drop(at, IMPORTED))
        return BAD_VALUE;
    if (last)
        count(OPENED, -1);
    return 0;
}

cuda_error memory_dma_buf(cuda_pointer at, size_t bytes, int *out)
{
    char path[64] = "";
    off_t offset = 0;
    pthread_rwlock_rdlock(&guard);
    for (const region *each = regions; each; each = each->next) {
        uint64_t inside = at - (each->start - SHIFT);
        if (each->kind == DEVICE && inside < each->mapped && bytes <= each->mapped - inside) {
            snprintf(path, sizeof path, "/proc/self/fd/%d", each->fd);
            offset = (off_t)inside;
        }
    }
    pthread_rwlock_unlock(&guard);
    if (!*path || !bytes || at % PAGE || bytes % PAGE)
        return BAD_VALUE;
    *out = open(path, O_RDWR | O_CLOEXEC);
    return *out >= 0 && lseek(*out, offset, SEEK_SET) == offset ? 0 : NO_MEMORY;
}

/* --- looking and copying ------------------------------------------------------------------------------------------ */

bool memory_range(cuda_pointer at, cuda_pointer *base, size_t *bytes)
{
    pthread_rwlock_rdlock(&guard);
    const region *found = at_(at);
    bool fine = found && found->kind != HOST;
    if (fine && base)
        *base = found->start;
    if (fine && bytes)
        *bytes = found->bytes;
    pthread_rwlock_unlock(&guard);
    return fine;
}

int memory_device(cuda_pointer at)
{
    pthread_rwlock_rdlock(&guard);
    const region *found = at_(at);
    int device = found ? found->device : -2;
    pthread_rwlock_unlock(&guard);
    return device;
}

/* An address at which the processor may touch device memory; NULL for other memory. */
EMU_API void *emu_alias(const void *pointer)
{
    pthread_rwlock_rdlock(&guard);
    const region *found = at_((uintptr_t)pointer);
    void *alias = found && found->kind != HOST ? found->alias + ((uintptr_t)pointer - found->start) : NULL;
    pthread_rwlock_unlock(&guard);
    return alias;
}

/* Under the guard; NULL where it is not all in one piece of known memory. */
static unsigned char *reachable(cuda_pointer at, size_t bytes)
{
    const region *found = at_(at);
    return found && bytes <= found->bytes - (at - found->start) ? found->alias + (at - found->start) : NULL;
}

bool memory_known(cuda_pointer at, size_t bytes)
{
    pthread_rwlock_rdlock(&guard);
    bool known = reachable(at, bytes);
    pthread_rwlock_unlock(&guard);
    return known;
}

bool memory_copy(cuda_pointer dst, cuda_pointer src, size_t bytes)
{
    pthread_rwlock_rdlock(&guard);
    unsigned char *to = reachable(dst, bytes), *from = reachable(src, bytes);
    if (to && from)
        memmove(to, from, bytes);
    pthread_rwlock_unlock(&guard);
    return to && from;
}

bool memory_read(void *out, cuda_pointer src, size_t bytes)
{
    pthread_rwlock_rdlock(&guard);
    const unsigned char *from = reachable(src, bytes);
    if (from)
        memcpy(out, from, bytes);
    pthread_rwlock_unlock(&guard);
    return from;
}
