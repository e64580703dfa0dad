/* libibverbs.so.1 as it is, but for dma-bufs: Soft-RoCE's driver takes none. Here a registration of one maps what its
 * descriptor stands for and registers that, at the address that was asked for; the driver of tests/cuda_emulated gives
 * such descriptors out. REAL is the path of the library of this host. */

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* The same arguments to the function of that name behind us. */
#define FORWARD(name)                                                                                                  \
    static void *real_##name;                                                                                          \
    EXPORT __attribute__((naked)) void ibv_##name(void)                                                                \
    {                                                                                                                  \
        __asm__("jmp *%0" : : "m"(real_##name));                                                                       \
    }
#define ALL(each)                                                                                                      \
    each(get_device_list) each(free_device_list) each(get_device_name) each(open_device) each(close_device)            \
    each(query_device) each(query_port) each(query_gid) each(alloc_pd) each(dealloc_pd) each(reg_mr)                   \
    each(reg_mr_iova2) each(create_comp_channel) each(destroy_comp_channel) each(create_cq) each(destroy_cq)           \
    each(get_cq_event) each(ack_cq_events) each(create_qp) each(modify_qp) each(destroy_qp) each(get_async_event)      \
    each(ack_async_event) each(wc_status_str) each(is_fork_initialized) each(fork_init)

ALL(FORWARD)

typedef struct registered {
    struct registered *next;
    void *mr, *start;
    size_t bytes;
} registered;

static void *(*reg_mr_iova)(void *pd, void *start, size_t bytes, uint64_t iova, int access);
static int (*dereg_mr)(void *mr);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static registered *all;

static __attribute__((constructor)) void load(void)
{
    void *real = dlopen(REAL, RTLD_NOW | RTLD_GLOBAL); /* its drivers look for it among what is global */
    if (!real) {
        fprintf(stderr, "dma_buf: %s\n", dlerror());
        abort();
    }
#define FIND(name) real_##name = dlsym(real, "ibv_" #name);
    ALL(FIND)
    *(void **)&reg_mr_iova = dlsym(real, "ibv_reg_mr_iova");
    *(void **)&dereg_mr = dlsym(real, "ibv_dereg_mr");
}

EXPORT void *ibv_reg_dmabuf_mr(void *pd, uint64_t offset, size_t bytes, uint64_t iova, int fd, int access)
{
    enum { PAGE = 4096 };
    off_t base = lseek(fd, 0, SEEK_CUR);
    uint64_t inside = offset % PAGE;
    if (base < 0 || inside != iova % PAGE) { /* as the kernel wants it */
        errno = EINVAL;
        return NULL;
    }
    registered *made = calloc(1, sizeof *made);
    made->bytes = inside + bytes;
    made->start = mmap(NULL, made->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, base + (off_t)(offset - inside));
    if (made->start == MAP_FAILED) {
        free(made);
        return NULL;
    }
    made->mr = reg_mr_iova(pd, (char *)made->start + inside, bytes, iova, access);
    pthread_mutex_lock(&lock);
    made->next = all;
    all = made;
    pthread_mutex_unlock(&lock);
    return made->mr;
}

EXPORT int ibv_dereg_mr(void *mr)
{
    registered *gone = NULL;
    pthread_mutex_lock(&lock);
    for (registered **at = &all; *at; at = &(*at)->next)
        if ((*at)->mr == mr) {
            gone = *at;
            *at = gone->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    int error = dereg_mr(mr);
    if (gone)
        munmap(gone->start, gone->bytes);
    free(gone);
    return error;
}
