/* The processor itself as a device: its memory is host memory, its engine the calling thread. For tests, and for host
 * memory behind a transport that stages. */

#include "backend.h"
#include "device.h"

#include <errno.h>
#include <stdlib.h>

enum { ALIGNMENT = 4096 };

static int the_only_one;

static void *open_(int index)
{
    return index > 0 ? (pd_fail(ENODEV, "there is no cpu device %d, only 0", index), NULL) : &the_only_one;
}

static void close_(void *own)
{
    (void)own;
}

static void *alloc(void *own, size_t bytes)
{
    (void)own;
    size_t whole = bytes > SIZE_MAX - ALIGNMENT ? 0 : (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *at = whole ? aligned_alloc(ALIGNMENT, whole) : NULL;
    return at ? at : (pd_fail(ENOMEM, "no memory of %zu bytes", bytes), NULL);
}

static void release(void *own, void *at)
{
    (void)own;
    free(at);
}

static int pin(void *own, void *at, size_t bytes)
{
    (void)own;
    return at && bytes ? 0 : pd_fail(EINVAL, "%zu bytes at %p cannot be pinned", bytes, at);
}

static void unpin(void *own, void *at)
{
    (void)own, (void)at;
}

static int move(void *own, const pd_move *moves, size_t count, pd_direction which)
{
    (void)own, (void)which; /* all of it is memory here */
    for (size_t i = 0; i < count; i++)
        pd_copy((void *)(uintptr_t)moves[i].dst, (const void *)(uintptr_t)moves[i].src, moves[i].bytes);
    return 0;
}

const pd_device_kind pd_cpu = {
    .name = "cpu",
    .open = open_,
    .close = close_,
    .alloc = alloc,
    .release = release,
    .pin = pin,
    .unpin = unpin,
    .move = move,
};
