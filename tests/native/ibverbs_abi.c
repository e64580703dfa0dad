/* Compiles where our own declarations of libibverbs (csrc/ibverbs.h) agree with the real header. */

#include "../../csrc/ibverbs.h"

#include <infiniband/verbs.h>
#include <stddef.h>

#define SAME(ours, theirs) _Static_assert((ours) == (theirs), #ours " is not " #theirs)
#define FIELD(ours, a, theirs, b) \
    SAME(offsetof(ours, a), offsetof(theirs, b)); \
    SAME(sizeof(((ours *)0)->a), sizeof(((theirs *)0)->b))
#define BOTH(ours, theirs, a) FIELD(ours, a, theirs, a)

SAME(IB_LINK_ETHERNET, IBV_LINK_LAYER_ETHERNET);
SAME(IB_PORT_ACTIVE, IBV_PORT_ACTIVE);
SAME(IB_LOCAL_WRITE, IBV_ACCESS_LOCAL_WRITE);
SAME(IB_REMOTE_WRITE, IBV_ACCESS_REMOTE_WRITE);
SAME(IB_REMOTE_READ, IBV_ACCESS_REMOTE_READ);
SAME(IB_ON_DEMAND, IBV_ACCESS_ON_DEMAND);
SAME(IB_RELAXED_ORDERING, IBV_ACCESS_RELAXED_ORDERING);
SAME(IB_QPT_RC, IBV_QPT_RC);
SAME(IB_QPS_INIT, IBV_QPS_INIT);
SAME(IB_QPS_RTR, IBV_QPS_RTR);
SAME(IB_QPS_RTS, IBV_QPS_RTS);
SAME(IB_QPS_ERR, IBV_QPS_ERR);
SAME(IB_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE);
SAME(IB_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_WRITE_WITH_IMM);
SAME(IB_WR_RDMA_READ, IBV_WR_RDMA_READ);
SAME(IB_SEND_SIGNALED, IBV_SEND_SIGNALED);
SAME(IB_WC_SUCCESS, IBV_WC_SUCCESS);
SAME(IB_WC_WR_FLUSH_ERR, IBV_WC_WR_FLUSH_ERR);
SAME(IB_WC_REM_ACCESS_ERR, IBV_WC_REM_ACCESS_ERR);
SAME(IB_WC_RETRY_EXC_ERR, IBV_WC_RETRY_EXC_ERR);
SAME(IB_EVENT_DEVICE_FATAL, IBV_EVENT_DEVICE_FATAL);
SAME(IB_EVENT_PORT_ACTIVE, IBV_EVENT_PORT_ACTIVE);
SAME(IB_EVENT_PORT_ERR, IBV_EVENT_PORT_ERR);
SAME(IB_FORK_UNNEEDED, IBV_FORK_UNNEEDED);
SAME(IB_QP_STATE, IBV_QP_STATE);
SAME(IB_QP_ACCESS_FLAGS, IBV_QP_ACCESS_FLAGS);
SAME(IB_QP_PKEY_INDEX, IBV_QP_PKEY_INDEX);
SAME(IB_QP_PORT, IBV_QP_PORT);
SAME(IB_QP_AV, IBV_QP_AV);
SAME(IB_QP_PATH_MTU, IBV_QP_PATH_MTU);
SAME(IB_QP_TIMEOUT, IBV_QP_TIMEOUT);
SAME(IB_QP_RETRY_CNT, IBV_QP_RETRY_CNT);
SAME(IB_QP_RNR_RETRY, IBV_QP_RNR_RETRY);
SAME(IB_QP_RQ_PSN, IBV_QP_RQ_PSN);
SAME(IB_QP_MAX_QP_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC);
SAME(IB_QP_MIN_RNR_TIMER, IBV_QP_MIN_RNR_TIMER);
SAME(IB_QP_SQ_PSN, IBV_QP_SQ_PSN);
SAME(IB_QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_DEST_RD_ATOMIC);
SAME(IB_QP_DEST_QPN, IBV_QP_DEST_QPN);

SAME(sizeof(ib_gid), sizeof(union ibv_gid));
SAME(sizeof(ib_pd), sizeof(struct ibv_pd));
SAME(sizeof(ib_mr), sizeof(struct ibv_mr));
BOTH(ib_mr, struct ibv_mr, lkey);
BOTH(ib_mr, struct ibv_mr, rkey);
BOTH(ib_channel, struct ibv_comp_channel, fd);
BOTH(ib_cq, struct ibv_cq, cq_context);
BOTH(ib_qp, struct ibv_qp, qp_num);
BOTH(ib_qp, struct ibv_qp, send_cq);
SAME(sizeof(ib_qp_init_attr), sizeof(struct ibv_qp_init_attr));
BOTH(ib_qp_init_attr, struct ibv_qp_init_attr, cap);
BOTH(ib_qp_init_attr, struct ibv_qp_init_attr, qp_type);
BOTH(ib_qp_init_attr, struct ibv_qp_init_attr, sq_sig_all);
SAME(sizeof(ib_qp_cap), sizeof(struct ibv_qp_cap));
SAME(sizeof(ib_ah_attr), sizeof(struct ibv_ah_attr));
BOTH(ib_ah_attr, struct ibv_ah_attr, grh.sgid_index);
BOTH(ib_ah_attr, struct ibv_ah_attr, grh.hop_limit);
BOTH(ib_ah_attr, struct ibv_ah_attr, grh.traffic_class);
BOTH(ib_ah_attr, struct ibv_ah_attr, dlid);
BOTH(ib_ah_attr, struct ibv_ah_attr, is_global);
BOTH(ib_ah_attr, struct ibv_ah_attr, port_num);
SAME(sizeof(ib_qp_attr), sizeof(struct ibv_qp_attr));
BOTH(ib_qp_attr, struct ibv_qp_attr, qp_state);
BOTH(ib_qp_attr, struct ibv_qp_attr, path_mtu);
BOTH(ib_qp_attr, struct ibv_qp_attr, rq_psn);
BOTH(ib_qp_attr, struct ibv_qp_attr, sq_psn);
BOTH(ib_qp_attr, struct ibv_qp_attr, dest_qp_num);
BOTH(ib_qp_attr, struct ibv_qp_attr, qp_access_flags);
BOTH(ib_qp_attr, struct ibv_qp_attr, ah_attr);
BOTH(ib_qp_attr, struct ibv_qp_attr, pkey_index);
BOTH(ib_qp_attr, struct ibv_qp_attr, max_rd_atomic);
BOTH(ib_qp_attr, struct ibv_qp_attr, max_dest_rd_atomic);
BOTH(ib_qp_attr, struct ibv_qp_attr, min_rnr_timer);
BOTH(ib_qp_attr, struct ibv_qp_attr, port_num);
BOTH(ib_qp_attr, struct ibv_qp_attr, timeout);
BOTH(ib_qp_attr, struct ibv_qp_attr, retry_cnt);
BOTH(ib_qp_attr, struct ibv_qp_attr, rnr_retry);
SAME(sizeof(ib_sge), sizeof(struct ibv_sge));
SAME(sizeof(ib_send_wr), sizeof(struct ibv_send_wr));
BOTH(ib_send_wr, struct ibv_send_wr, sg_list);
BOTH(ib_send_wr, struct ibv_send_wr, num_sge);
BOTH(ib_send_wr, struct ibv_send_wr, opcode);
BOTH(ib_send_wr, struct ibv_send_wr, send_flags);
BOTH(ib_send_wr, struct ibv_send_wr, imm_data);
FIELD(ib_send_wr, rdma.remote_addr, struct ibv_send_wr, wr.rdma.remote_addr);
FIELD(ib_send_wr, rdma.rkey, struct ibv_send_wr, wr.rdma.rkey);
SAME(sizeof(ib_recv_wr), sizeof(struct ibv_recv_wr));
BOTH(ib_recv_wr, struct ibv_recv_wr, num_sge);
SAME(sizeof(ib_wc), sizeof(struct ibv_wc));
BOTH(ib_wc, struct ibv_wc, status);
BOTH(ib_wc, struct ibv_wc, opcode);
BOTH(ib_wc, struct ibv_wc, imm_data);
BOTH(ib_wc, struct ibv_wc, wc_flags);
SAME(sizeof(ib_device_attr), sizeof(struct ibv_device_attr));
BOTH(ib_device_attr, struct ibv_device_attr, max_mr_size);
BOTH(ib_device_attr, struct ibv_device_attr, max_qp_wr);
BOTH(ib_device_attr, struct ibv_device_attr, max_qp_rd_atom);
BOTH(ib_device_attr, struct ibv_device_attr, max_qp_init_rd_atom);
BOTH(ib_device_attr, struct ibv_device_attr, max_cqe);
_Static_assert(sizeof(ib_port_attr) >= sizeof(struct ibv_port_attr), "room for what the library writes");
BOTH(ib_port_attr, struct ibv_port_attr, active_mtu);
BOTH(ib_port_attr, struct ibv_port_attr, lid);
BOTH(ib_port_attr, struct ibv_port_attr, link_layer);
BOTH(ib_port_attr, struct ibv_port_attr, port_cap_flags2);
SAME(sizeof(ib_async_event), sizeof(struct ibv_async_event));
BOTH(ib_async_event, struct ibv_async_event, event_type);
SAME(offsetof(ib_context, ops) + IB_OP_POLL_CQ * sizeof(void *), offsetof(struct ibv_context, ops.poll_cq));
SAME(offsetof(ib_context, ops) + IB_OP_REQ_NOTIFY_CQ * sizeof(void *), offsetof(struct ibv_context, ops.req_notify_cq));
SAME(offsetof(ib_context, ops) + IB_OP_POST_SEND * sizeof(void *), offsetof(struct ibv_context, ops.post_send));
SAME(offsetof(ib_context, ops) + IB_OP_POST_RECV * sizeof(void *), offsetof(struct ibv_context, ops.post_recv));
BOTH(ib_context, struct ibv_context, async_fd);
BOTH(ib_context, struct ibv_context, cmd_fd);
