/* The interface of device.h over any kind of device. */

#include "backend.h"
#include "device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const pd_device_kind *const kinds[] = {&pd_cpu, &pd_acl, &pd_cuda};

struct pd_device {
    const pd_device_kind *kind;
    void *own;
};

static void *pointer(uint64_t at)
{
    return (void *)(uintptr_t)at;
}

static const pd_device_kind *find(const char *name)
{
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kinds[i]->name, name))
            return kinds[i];
    return pd_fail(ENOENT, "there is no kind of device %s in this build", name), NULL;
}

int pd_device_probe(const char *name)
{
    const pd_device_kind *found = find(name);
    return !found ? -ENOENT : found->probe ? found->probe() : 0;
}

int pd_device_index(const char *name, uint64_t at)
{
    const pd_device_kind *found = find(name);
    return !found ? -1 : found->index_of ? found->index_of(pointer(at)) : 0;
}

int pd_device_pci(const char *name, int index, char *out, int room)
{
    const pd_device_kind *found = find(name);
    return !found ? -ENOENT : found->pci ? found->pci(index, out, room) : pd_fail(ENOTSUP, "a %s has none that is told", name);
}

int pd_device_open(const char *name, int index, pd_device **out)
{
    const pd_device_kind *found = find(name);
    int error = found ? found->probe ? found->probe() : 0 : -ENOENT;
    if (error)
        return error;
    pd_device *made = calloc(1, sizeof *made);
    if (!made)
        return pd_fail(ENOMEM, "no memory for a device");
    made->kind = found;
    made->own = found->open(index);
    if (!made->own) {
        free(made);
        return -EIO;
    }
    *out = made;
    return 0;
}

void pd_device_close(pd_device *device)
{
    device->kind->close(device->own);
    free(device);
}

int pd_device_alloc(pd_device *device, size_t bytes, uint64_t *out)
{
    void *at = bytes ? device->kind->alloc(device->own, bytes) : NULL;
    if (!at)
        return bytes ? -ENOMEM : pd_fail(EINVAL, "no memory of 0 bytes can be had");
    *out = (uint64_t)(uintptr_t)at;
    return 0;
}

void pd_device_release(pd_device *device, uint64_t at)
{
    device->kind->release(device->own, pointer(at));
}

int pd_device_pin(pd_device *device, uint64_t at, size_t bytes)
{
    return device->kind->pin(device->own, pointer(at), bytes);
}

void pd_device_unpin(pd_device *device, uint64_t at)
{
    device->kind->unpin(device->own, pointer(at));
}

int pd_device_move(pd_device *device, const pd_move *moves, size_t count, pd_direction which)
{
    return count ? device->kind->move(device->own, moves, count, which) : 0;
}
