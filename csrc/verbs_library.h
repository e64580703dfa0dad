/* libibverbs, as far as we use it; opened when the first transport is. */
#ifndef PD_VERBS_LIBRARY_H
#define PD_VERBS_LIBRARY_H

#include "verbs.h"

typedef struct {
    ib_device **(*get_device_list)(int *count);
    void (*free_device_list)(ib_device **list);
    const char *(*get_device_name)(ib_device *device);
    ib_context *(*open_device)(ib_device *device);
    int (*close_device)(ib_context *context);
    int (*query_device)(ib_context *context, ib_device_attr *out);
    int (*query_port)(ib_context *context, uint8_t port, ib_port_attr *out);
    int (*query_gid)(ib_context *context, uint8_t port, int index, ib_gid *out);
    ib_pd *(*alloc_pd)(ib_context *context);
    int (*dealloc_pd)(ib_pd *pd);
    ib_mr *(*reg_mr)(ib_pd *pd, void *at, size_t bytes, int access);
    ib_mr *(*reg_mr_iova2)(ib_pd *pd, void *at, size_t bytes, uint64_t iova, unsigned access);
    ib_mr *(*reg_dmabuf_mr)(ib_pd *pd, uint64_t offset, size_t bytes, uint64_t iova, int fd, int access);
    int (*dereg_mr)(ib_mr *mr);
    ib_channel *(*create_comp_channel)(ib_context *context);
    int (*destroy_comp_channel)(ib_channel *channel);
    ib_cq *(*create_cq)(ib_context *context, int size, void *which, ib_channel *channel, int vector);
    int (*destroy_cq)(ib_cq *cq);
    int (*get_cq_event)(ib_channel *channel, ib_cq **cq, void **which);
    void (*ack_cq_events)(ib_cq *cq, unsigned count);
    ib_qp *(*create_qp)(ib_pd *pd, ib_qp_init_attr *wanted);
    int (*modify_qp)(ib_qp *qp, ib_qp_attr *values, int mask);
    int (*destroy_qp)(ib_qp *qp);
    int (*get_async_event)(ib_context *context, ib_async_event *out);
    void (*ack_async_event)(ib_async_event *event);
    const char *(*wc_status_str)(int status);
    int (*is_fork_initialized)(void);
    int (*fork_init)(void);
} verbs_library;

extern verbs_library ib;

#endif
