/* Sockets that never block, as the backends with a loop of their own use them. */
#ifndef PD_NET_H
#define PD_NET_H

#include "pd.h"

#include <stdbool.h>
#include <sys/socket.h>

enum { NET_PATIENCE_MS = 15000 }; /* without a byte where one is due */

/* Something that epoll tells of. */
typedef struct source {
    void (*ready)(struct source *self, uint32_t events);
    int fd;
} source;

typedef struct { /* an address and a port, as peers are told them */
    uint16_t family, port; /* 4 or 6 */
    unsigned char address[16];
} net_address;

int64_t net_now_ms(void);
void net_watch(int epoll, source *what, bool writing, bool added);
void net_drop(int epoll, source *what);
void net_tune(int fd);
void net_ring(int bell);   /* an eventfd */
void net_rung(int bell);
bool net_valid(const net_address *where);
/* A socket that is being connected, or a negative errno. */
int net_connect(const net_address *where);
/* A socket that listens at options->host and ->port, and in `where` what peers are told; negative after pd_fail. */
int net_listen(const pd_options *options, net_address *where);
/* A connection of a listener, or -1: none, or no descriptor left, and then the one that waited is refused. `spare` is a
 * descriptor to do that with. */
int net_accept(int listener, int *spare);
int net_spare(void);
/* Send what the socket takes now of `bytes` from `*at` on; false: the connection is lost, errno says why. */
bool net_send(int fd, const unsigned char *out, size_t bytes, size_t *at);

#endif
