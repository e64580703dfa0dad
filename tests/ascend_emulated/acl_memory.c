/*
 * Device memory and pinned host memory. A device pointer's own pages may not be touched, so that a CPU that does
 * crashes as it should; the emulation reaches the same pages through a second mapping, the alias.
 */

#include "emu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALIGNMENT ((size_t)2 << 20)

typedef struct region {
    struct region *next;
    uintptr_t start;
    size_t bytes;
    uint8_t *alias;
    emu_kind kind;
    int device;
    size_t mapped;       /* bytes mapped at start that are this region's to unmap, 0: they are somebody else's */
    size_t alias_mapped; /* the same of the alias */
} region;

static region *regions;
/* Written by what changes the map, read for as long as a copy takes: nothing is unmapped under a copy. */
static pthread_rwlock_t guard = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

void emu_memory_forked(void)
{
    pthread_rwlock_init(&guard, NULL);
    regions = NULL;
}

static size_t rounded(size_t bytes, size_t to)
{
    return (bytes + to - 1) / to * to;
}

static region *region_at(uintptr_t address)
{
    for (region *each = regions; each; each = each->next)
        if (address - each->start < each->bytes)
            return each;
    return NULL;
}

static bool is_free(uintptr_t start, size_t bytes)
{
    for (region *each = regions; each; each = each->next)
        if (start < each->start + each->bytes && each->start < start + bytes)
            return false;
    return true;
}

/* False where it would overlap known memory, or there is no memory for the entry. */
static bool region_add(region what)
{
    region *added = malloc(sizeof *added);
    if (!added)
        return false;
    *added = what;
    pthread_rwlock_wrlock(&guard);
    bool fits = is_free(what.start, what.bytes);
    if (fits) {
        added->next = regions;
        regions = added;
    }
    pthread_rwlock_unlock(&guard);
    if (!fits)
        free(added);
    return fits;
}

static void region_free(region *what)
{
    if (what->mapped)
        munmap((void *)what->start, what->mapped);
    if (what->alias_mapped)
        munmap(what->alias, what->alias_mapped);
    free(what);
}

/* Takes the aligned middle out of a larger reservation. */
static void *reserve(size_t bytes)
{
    uint8_t *all = mmap(NULL, bytes + ALIGNMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED)
        return NULL;
    uint8_t *start = (uint8_t *)rounded((uintptr_t)all, ALIGNMENT);
    if (start > all)
        munmap(all, (size_t)(start - all));
    munmap(start + bytes, ALIGNMENT - (size_t)(start - all));
    return start;
}

void *emu_memory_allocate(int device, size_t bytes)
{
    size_t mapped = rounded(bytes, ALIGNMENT);
    int fd = memfd_create("ascend_emulated", MFD_CLOEXEC);
    if (fd < 0)
        return NULL;
    void *start = NULL, *alias = MAP_FAILED;
    if (!ftruncate(fd, (off_t)mapped) && (start = reserve(mapped)))
        alias = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    bool made = alias != MAP_FAILED && mmap(start, mapped, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0) == start;
    close(fd);
    region added = {NULL, (uintptr_t)start, bytes, alias, EMU_DEVICE, device, mapped, mapped};
    if (made && region_add(added))
        return start;
    if (start)
        munmap(start, mapped);
    if (alias != MAP_FAILED)
        munmap(alias, mapped);
    return NULL;
}

int emu_memory_pin(void *pointer, size_t bytes, int device, bool owned)
{
    region added = {NULL, (uintptr_t)pointer, bytes, pointer, EMU_PINNED, device, owned ? rounded(bytes, 4096) : 0, 0};
    return region_add(added) ? 0 : ACL_RT_PARAM;
}

/* An address of its own for the device's view of pinned memory, so that nobody takes the two for one. */
void *emu_memory_map(void *pointer, size_t bytes, int device)
{
    size_t mapped = rounded(bytes, ALIGNMENT);
    void *start = reserve(mapped);
    region added = {NULL, (uintptr_t)start, bytes, pointer, EMU_DEVICE, device, mapped, 0};
    if (start && region_add(added))
        return start;
    if (start)
        munmap(start, mapped);
    return NULL;
}

/* Takes out the regions `match` says; the caller frees what it gets. */
static region *take(bool (*match)(const region *, const void *), const void *key)
{
    region *out = NULL;
    pthread_rwlock_wrlock(&guard);
    for (region **link = &regions; *link;) {
        region *each = *link;
        if (!match(each, key)) {
            link = &each->next;
            continue;
        }
        *link = each->next;
        each->next = out;
        out = each;
    }
    pthread_rwlock_unlock(&guard);
    return out;
}

static int release(region *taken)
{
    int count = 0;
    while (taken) {
        region *next = taken->next;
        region_free(taken);
        taken = next;
        count++;
    }
    return count;
}

typedef struct {
    const void *pointer;
    emu_kind kind;
    bool owned;
} named;

/* The device's view of unpinned memory goes with it: its alias is that memory. */
static bool is_named(const region *each, const void *key)
{
    const named *what = key;
    bool is_view = each->kind == EMU_DEVICE && each->mapped && !each->alias_mapped;
    if (is_view)
        return what->kind == EMU_PINNED && !what->owned && each->alias == what->pointer;
    return each->start == (uintptr_t)what->pointer && each->kind == what->kind && (each->mapped != 0) == what->owned;
}

/* aclrtFree and aclrtFreeHost */
int emu_memory_free(void *pointer, emu_kind kind)
{
    named what = {pointer, kind, true};
    return release(take(is_named, &what)) ? 0 : ACL_RT_PARAM;
}

/* aclrtHostUnregister and emu_disown */
static int forget(void *pointer, emu_kind kind)
{
    named what = {pointer, kind, false};
    return release(take(is_named, &what)) ? 0 : ACL_RT_PARAM;
}

int emu_memory_unpin(void *pointer)
{
    return forget(pointer, EMU_PINNED);
}

static bool is_of_device(const region *each, const void *key)
{
    return each->kind == EMU_DEVICE && each->alias_mapped && each->device == *(const int *)key;
}

void emu_memory_reset(int device)
{
    release(take(is_of_device, &device));
}

size_t emu_memory_used(int device)
{
    size_t used = 0;
    pthread_rwlock_rdlock(&guard);
    for (region *each = regions; each; each = each->next)
        if (is_of_device(each, &device))
            used += each->mapped;
    pthread_rwlock_unlock(&guard);
    return used;
}

int emu_adopt(void *pointer, size_t bytes)
{
    int device = emu_current_device();
    region added = {NULL, (uintptr_t)pointer, bytes, pointer, EMU_DEVICE, device < 0 ? 0 : device, 0, 0};
    return pointer && bytes && region_add(added) ? 0 : ACL_RT_PARAM;
}

int emu_disown(void *pointer)
{
    return forget(pointer, EMU_DEVICE);
}

emu_kind emu_kind_of(const void *pointer, size_t bytes)
{
    uintptr_t start = (uintptr_t)pointer;
    pthread_rwlock_rdlock(&guard);
    const region *found = region_at(start);
    emu_kind kind = EMU_PAGEABLE;
    if (found)
        kind = bytes <= found->bytes - (start - found->start) ? found->kind : EMU_OUTSIDE;
    pthread_rwlock_unlock(&guard);
    return kind;
}

int emu_device_of(const void *pointer)
{
    pthread_rwlock_rdlock(&guard);
    const region *found = region_at((uintptr_t)pointer);
    int device = found ? found->device : -1;
    pthread_rwlock_unlock(&guard);
    return device;
}

void *emu_alias(const void *pointer)
{
    pthread_rwlock_rdlock(&guard);
    const region *found = region_at((uintptr_t)pointer);
    void *alias = found && found->kind == EMU_DEVICE ? found->alias + ((uintptr_t)pointer - found->start) : NULL;
    pthread_rwlock_unlock(&guard);
    return alias;
}

/* NULL where the memory is no longer what the caller takes it for. */
static void *reachable(emu_end end, size_t bytes)
{
    uintptr_t address = (uintptr_t)end.pointer;
    const region *found = region_at(address);
    if (!found)
        return end.kind == EMU_PAGEABLE ? end.pointer : NULL;
    if ((found->kind == EMU_DEVICE) != (end.kind == EMU_DEVICE) || bytes > found->bytes - (address - found->start))
        return NULL;
    return found->alias + (address - found->start);
}

bool emu_copy(emu_end to, emu_end from, size_t bytes)
{
    pthread_rwlock_rdlock(&guard);
    void *into = reachable(to, bytes), *out_of = reachable(from, bytes);
    if (into && out_of)
        memmove(into, out_of, bytes);
    pthread_rwlock_unlock(&guard);
    return into && out_of;
}
