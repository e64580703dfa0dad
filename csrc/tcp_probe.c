/* How many lanes are worth having here: bare TCP over the loopback by one, two, four and eight pairs of threads. */

#include "tcp.h"

#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 8, LANE_BYTES = 4 << 20, CALL_BYTES = 1 << 20, TRIES = 3, PATIENCE_S = 2 };

typedef struct {
    const pd_options *options;
    int fd, index, sends;
    unsigned char *memory; /* CALL_BYTES, sent or filled again and again */
} end;

static void *move(void *argument)
{
    const end *each = argument;
    pd_pin(each->options, each->index);
    for (size_t left = LANE_BYTES; left;) {
        size_t at = left % CALL_BYTES ? CALL_BYTES - left % CALL_BYTES : 0, most = CALL_BYTES - at;
        unsigned char *where = each->memory + at;
        ssize_t done = each->sends ? send(each->fd, where, most, MSG_NOSIGNAL) : recv(each->fd, where, most, 0);
        if (done <= 0)
            break; /* a deadline passed, or the other end gave up: the figure is none */
        left -= (size_t)done;
    }
    shutdown(each->fd, SHUT_RDWR);
    return NULL;
}

static int join(int fds[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {PATIENCE_S, 0};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fds[1] = -1;
    setsockopt(fds[0], SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); /* of connect, too */
    setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (listener >= 0 && fds[0] >= 0 && !bind(listener, (struct sockaddr *)&address, size) && !listen(listener, 1) &&
        !getsockname(listener, (struct sockaddr *)&address, &size) && !connect(fds[0], (struct sockaddr *)&address, size))
        fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    int error = fds[1] < 0 ? errno : 0;
    for (int i = 0; i < 2 && !error; i++) {
        net_tune(fds[i]);
        setsockopt(fds[i], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(fds[i], SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    }
    if (listener >= 0)
        close(listener);
    return error;
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* GB/s of so many lanes, 0 where it cannot be tried. */
static double gbps(const pd_options *options, int lanes, unsigned char *memory)
{
    end ends[2 * MOST];
    pthread_t threads[2 * MOST];
    int joined = 0, started = 0, error = 0;
    for (; joined < lanes && !error; joined++) {
        int fds[2];
        error = join(fds);
        for (int k = 0; k < 2; k++)
            ends[2 * joined + k] = (end){options, fds[k], joined, k, memory + (size_t)(2 * joined + k) * CALL_BYTES};
    }
    sigset_t every, kept;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &kept); /* signals are for the host's own threads */
    double begin = seconds_now();
    for (; !error && started < 2 * lanes; started += !error)
        error = pthread_create(&threads[started], NULL, move, &ends[started]);
    pthread_sigmask(SIG_SETMASK, &kept, NULL);
    for (int i = 0; error && i < started; i++)
        shutdown(ends[i].fd, SHUT_RDWR);
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    double seconds = seconds_now() - begin;
    for (int i = 0; i < 2 * joined; i++)
        if (ends[i].fd >= 0)
            close(ends[i].fd);
    return error || seconds > PATIENCE_S ? 0 : lanes * (double)LANE_BYTES / seconds / 1e9;
}

int pd_tcp_lanes(const pd_options *options, int most, double out[4])
{
    unsigned char *memory = malloc((size_t)2 * MOST * CALL_BYTES);
    if (!memory)
        return pd_fail(ENOMEM, "no memory to try lanes with");
    memset(memory, 1, (size_t)2 * MOST * CALL_BYTES);
    int count = 0;
    for (int lanes = 1; lanes <= MOST && (lanes <= most || lanes == 1); lanes *= 2, count++)
        for (int i = 0; i < TRIES; i++) {
            double one = gbps(options, lanes, memory);
            out[count] = !i || one > out[count] ? one : out[count];
        }
    free(memory);
    return count;
}
