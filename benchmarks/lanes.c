/* The limit that a transport over TCP is measured against: two lanes, each one blocking thread at either end, that send
 * scattered chunks straight from memory and receive them straight into other scattered places, with no protocol at all.
 * The receiving process prints GB/s, and the CPU seconds per GB of both.
 *
 *     lanes CHUNK_BYTES CHUNKS PIN(0|1) ADDRESS [NETNS]
 *
 * With PIN both threads of a lane stay on one processor. The sender listens at ADDRESS, in the network namespace whose file is NETNS where one is given. */

#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LANES = 2, IOVECS = 1024, CALL_BYTES = 1 << 20 };

static size_t chunk, chunks;
static int pin;
static unsigned char *memory;
static size_t *order;

typedef struct {
    int fd;
    size_t first, last;
    int sends;
} lane;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void *run(void *argument)
{
    lane *each = argument;
    if (pin) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(each->first ? 1 : 0, &set);
        sched_setaffinity(0, sizeof set, &set);
    }
    for (size_t at = each->first; at < each->last;) {
        struct iovec vector[IOVECS];
        size_t count = 0, bytes = 0;
        for (; at < each->last && count < IOVECS && bytes < CALL_BYTES; at++, bytes += chunk)
            vector[count++] = (struct iovec){memory + order[at] * chunk, chunk};
        for (size_t from = 0; from < count;) {
            struct msghdr message = {.msg_iov = vector + from, .msg_iovlen = count - from};
            ssize_t done = each->sends ? sendmsg(each->fd, &message, 0) : recvmsg(each->fd, &message, MSG_WAITALL);
            if (done <= 0)
                die(each->sends ? "sendmsg" : "recvmsg");
            for (; from < count && (size_t)done >= vector[from].iov_len; from++)
                done -= (ssize_t)vector[from].iov_len;
            if (done)
                vector[from].iov_base = (char *)vector[from].iov_base + done, vector[from].iov_len -= (size_t)done;
        }
    }
    return NULL;
}

static void both(int fds[LANES], int sends)
{
    pthread_t threads[LANES];
    lane lanes[LANES];
    for (size_t i = 0; i < LANES; i++) {
        lanes[i] = (lane){fds[i], i * chunks / LANES, (i + 1) * chunks / LANES, sends};
        pthread_create(&threads[i], NULL, run, &lanes[i]);
    }
    for (int i = 0; i < LANES; i++)
        pthread_join(threads[i], NULL);
}

static double cpu(int who)
{
    struct rusage used;
    getrusage(who, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + 1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void prepare(void)
{
    memory = mmap(NULL, 2 * chunk * chunks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    order = calloc(2 * chunks, sizeof *order);
    if (memory == MAP_FAILED || !order)
        die("memory");
    memset(memory, 1, 2 * chunk * chunks);
    for (size_t i = 0; i < 2 * chunks; i++)
        order[i] = i;
    for (size_t i = 2 * chunks; i > 1; i--) {
        size_t other = (size_t)rand() % i, kept = order[i - 1];
        order[i - 1] = order[other], order[other] = kept;
    }
}

/* Sends once it was told how it went to be ready; tells its CPU seconds at the end. */
static void sender(struct sockaddr_in *address, const char *space, int tell)
{
    int fd = space ? open(space, O_RDONLY) : -1, fds[LANES], listener;
    if (space && (fd < 0 || setns(fd, CLONE_NEWNET)))
        die(space);
    socklen_t size = sizeof *address;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)address, size) || listen(listener, LANES) ||
        getsockname(listener, (struct sockaddr *)address, &size))
        die("listen");
    prepare();
    if (write(tell, address, sizeof *address) != sizeof *address)
        die("tell");
    for (int i = 0; i < LANES; i++)
        fds[i] = accept(listener, NULL, NULL);
    char go;
    if (recv(fds[0], &go, 1, MSG_WAITALL) != 1)
        die("go");
    both(fds, 1); /* once to warm up: connections and pages */
    double before = cpu(RUSAGE_SELF);
    both(fds, 1);
    double used = cpu(RUSAGE_SELF) - before;
    if (write(tell, &used, sizeof used) != sizeof used)
        die("tell");
    exit(0);
}

int main(int count, char **words)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    if (count < 5 || inet_pton(AF_INET, words[4], &address.sin_addr) != 1)
        return fprintf(stderr, "usage: lanes CHUNK_BYTES CHUNKS PIN ADDRESS [NETNS]\n"), 2;
    chunk = strtoul(words[1], NULL, 10), chunks = strtoul(words[2], NULL, 10), pin = atoi(words[3]);
    srand((unsigned)time(NULL));
    int pipes[2], fds[LANES];
    if (pipe(pipes))
        die("pipe");
    if (!fork())
        sender(&address, count > 5 ? words[5] : NULL, pipes[1]);
    close(pipes[1]);
    prepare();
    if (read(pipes[0], &address, sizeof address) != sizeof address)
        return 1;
    for (int i = 0; i < LANES; i++) {
        fds[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fds[i], (struct sockaddr *)&address, sizeof address))
            die("connect");
    }
    double theirs, gigabytes = 1e-9 * (double)(chunk * chunks);
    if (write(fds[0], "g", 1) != 1)
        die("go");
    both(fds, 0);
    double used = cpu(RUSAGE_SELF), start = now();
    both(fds, 0);
    double seconds = now() - start;
    used = cpu(RUSAGE_SELF) - used;
    if (read(pipes[0], &theirs, sizeof theirs) != sizeof theirs)
        return 1;
    wait(NULL);
    printf("%.4f %.4f\n", gigabytes / seconds, (used + theirs) / gigabytes);
    return 0;
}
