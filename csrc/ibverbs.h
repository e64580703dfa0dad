/* What we use of libibverbs (ABI IBVERBS_1.1 and later), declared by ourselves, so that no header of it is needed to build
 * and no library to import. tests/native/ibverbs_abi.c compares all of it with the real header, where there is one. */
#ifndef PD_IBVERBS_H
#define PD_IBVERBS_H

#include <pthread.h>
#include <stdint.h>

enum { IB_LINK_ETHERNET = 2, IB_PORT_ACTIVE = 4 };
enum { IB_LOCAL_WRITE = 1, IB_REMOTE_WRITE = 2, IB_REMOTE_READ = 4, IB_ON_DEMAND = 64, IB_RELAXED_ORDERING = 1 << 20 };
enum { IB_QPT_RC = 2 };
enum { IB_QPS_INIT = 1, IB_QPS_RTR = 2, IB_QPS_RTS = 3, IB_QPS_ERR = 6 };
enum { IB_WR_RDMA_WRITE = 0, IB_WR_RDMA_WRITE_WITH_IMM = 1, IB_WR_RDMA_READ = 4 };
enum { IB_SEND_SIGNALED = 2 };
enum { IB_WC_SUCCESS = 0, IB_WC_WR_FLUSH_ERR = 5, IB_WC_REM_ACCESS_ERR = 10, IB_WC_RETRY_EXC_ERR = 12 };
enum { IB_EVENT_DEVICE_FATAL = 8, IB_EVENT_PORT_ACTIVE = 9, IB_EVENT_PORT_ERR = 10 };
enum { IB_FORK_UNNEEDED = 2 };
enum { /* which fields of ib_qp_attr are meant */
    IB_QP_STATE = 1 << 0,
    IB_QP_ACCESS_FLAGS = 1 << 3,
    IB_QP_PKEY_INDEX = 1 << 4,
    IB_QP_PORT = 1 << 5,
    IB_QP_AV = 1 << 7,
    IB_QP_PATH_MTU = 1 << 8,
    IB_QP_TIMEOUT = 1 << 9,
    IB_QP_RETRY_CNT = 1 << 10,
    IB_QP_RNR_RETRY = 1 << 11,
    IB_QP_RQ_PSN = 1 << 12,
    IB_QP_MAX_QP_RD_ATOMIC = 1 << 13,
    IB_QP_MIN_RNR_TIMER = 1 << 15,
    IB_QP_SQ_PSN = 1 << 16,
    IB_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
    IB_QP_DEST_QPN = 1 << 20,
};

typedef struct ib_device ib_device;
typedef struct ib_context ib_context;
typedef struct ib_srq ib_srq;

typedef union {
    uint8_t raw[16];
    uint64_t aligned[2];
} ib_gid;

typedef struct {
    ib_context *context;
    uint32_t handle;
} ib_pd;

typedef struct {
    ib_context *context;
    ib_pd *pd;
    void *addr;
    size_t length;
    uint32_t handle, lkey, rkey;
} ib_mr;

typedef struct {
    ib_context *context;
    int fd;
    int refcnt;
} ib_channel;

typedef struct { /* the rest is the library's */
    ib_context *context;
    ib_channel *channel;
    void *cq_context;
} ib_cq;

typedef struct { /* the rest is the library's */
    ib_context *context;
    void *qp_context;
    ib_pd *pd;
    ib_cq *send_cq, *recv_cq;
    ib_srq *srq;
    uint32_t handle, qp_num;
} ib_qp;

typedef struct {
    uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
} ib_qp_cap;

typedef struct {
    void *qp_context;
    ib_cq *send_cq, *recv_cq;
    ib_srq *srq;
    ib_qp_cap cap;
    int qp_type, sq_sig_all;
} ib_qp_init_attr;

typedef struct {
    struct {
        ib_gid dgid;
        uint32_t flow_label;
        uint8_t sgid_index, hop_limit, traffic_class;
    } grh;
    uint16_t dlid;
    uint8_t sl, src_path_bits, static_rate, is_global, port_num;
} ib_ah_attr;

typedef struct {
    int qp_state, cur_qp_state, path_mtu, path_mig_state;
    uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
    unsigned qp_access_flags;
    ib_qp_cap cap;
    ib_ah_attr ah_attr, alt_ah_attr;
    uint16_t pkey_index, alt_pkey_index;
    uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt,
        rnr_retry, alt_port_num, alt_timeout;
    uint32_t rate_limit;
} ib_qp_attr;

typedef struct {
    uint64_t addr;
    uint32_t length, lkey;
} ib_sge;

typedef struct ib_send_wr {
    uint64_t wr_id;
    struct ib_send_wr *next;
    ib_sge *sg_list;
    int num_sge, opcode;
    unsigned send_flags;
    uint32_t imm_data; /* in the network's order */
    struct {
        uint64_t remote_addr;
        uint32_t rkey;
        uint64_t unused[2]; /* of other operations */
    } rdma;
    uint64_t rest[7]; /* of other operations */
} ib_send_wr;

typedef struct ib_recv_wr {
    uint64_t wr_id;
    struct ib_recv_wr *next;
    ib_sge *sg_list;
    int num_sge;
} ib_recv_wr;

typedef struct {
    uint64_t wr_id;
    int status, opcode;
    uint32_t vendor_err, byte_len, imm_data, qp_num, src_qp;
    unsigned wc_flags;
    uint16_t pkey_index, slid;
    uint8_t sl, dlid_path_bits;
} ib_wc;

typedef struct {
    char fw_ver[64];
    uint64_t node_guid, sys_image_guid, max_mr_size, page_size_cap;
    uint32_t vendor_id, vendor_part_id, hw_ver;
    int max_qp, max_qp_wr;
    unsigned device_cap_flags;
    int max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom,
        max_qp_init_rd_atom, rest[16];
    uint8_t more[8];
} ib_device_attr;

typedef struct {
    int state, max_mtu, active_mtu, gid_tbl_len;
    uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr;
    uint16_t pkey_tbl_len, lid, sm_lid;
    uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer, flags;
    uint16_t port_cap_flags2;
    uint32_t newer[8]; /* fields that later versions may write */
} ib_port_attr;

typedef struct {
    union {
        void *object;
        int port_num;
    } element;
    int event_type;
} ib_async_event;

/* Three calls that are no symbols but pointers in the context, at these places among 31. */
enum { IB_OPS = 32, IB_OP_POLL_CQ = 11, IB_OP_REQ_NOTIFY_CQ = 12, IB_OP_POST_SEND = 25, IB_OP_POST_RECV = 26 };

struct ib_context {
    ib_device *device;
    void (*ops[IB_OPS])(void);
    int cmd_fd, async_fd, num_comp_vectors;
};

static inline int ib_poll_cq(ib_cq *cq, int most, ib_wc *out)
{
    return ((int (*)(ib_cq *, int, ib_wc *))cq->context->ops[IB_OP_POLL_CQ])(cq, most, out);
}

static inline int ib_req_notify_cq(ib_cq *cq)
{
    return ((int (*)(ib_cq *, int))cq->context->ops[IB_OP_REQ_NOTIFY_CQ])(cq, 0);
}

static inline int ib_post_send(ib_qp *qp, ib_send_wr *first, ib_send_wr **bad)
{
    return ((int (*)(ib_qp *, ib_send_wr *, ib_send_wr **))qp->context->ops[IB_OP_POST_SEND])(qp, first, bad);
}

static inline int ib_post_recv(ib_qp *qp, ib_recv_wr *first, ib_recv_wr **bad)
{
    return ((int (*)(ib_qp *, ib_recv_wr *, ib_recv_wr **))qp->context->ops[IB_OP_POST_RECV])(qp, first, bad);
}

#endif
