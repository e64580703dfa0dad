/* Mutated messages at both ends of the tcp backend, the same ones for the same seed; built with the sanitizers.
 *
 *     fuzz_tcp messages [seed [input ...]]
 *
 * Inputs are files of the corpus: the first byte says what the rest is sent to. With -DLIBFUZZER clang's fuzzer makes them.
 *
 * The owner must answer a good request after every batch of bad ones, and nothing but leased blocks may ever come out of
 * it. The reader must end every read, and nothing but its destination may be written to. */

#include "../../csrc/tcp.h"

#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define assert(true_) ((true_) ? (void)0 : (fprintf(stderr, "%s:%d: not so: %s (seed %llu)\n", __FILE__, __LINE__, #true_, seed), abort()))

enum { BLOCKS = 16, BLOCK = 512, STRIDE = 640, LEASED = 8, BATCH = 32, ROOM = BATCH * 4096, GUARD = 4096, LEASED_BYTE = 0x5a };

static unsigned long long seed;
static _Thread_local unsigned long long state;
static unsigned char memory[GUARD + BLOCKS * STRIDE + GUARD];
static const unsigned char CAPABILITY[16] = "sixteen bytes...";

static uint64_t chance(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static size_t mutate(unsigned char *bytes, size_t size, size_t room)
{
    static const uint64_t odd[] = {0, 1, 2, 15, 16, 17, 64, 65, 511, 512, 513, 1024, 1025, 1 << 20, (1 << 20) + 1, 0x7fffffff,
                                   0x80000000, 0xffffffff, 1ull << 32, 1ull << 62, ~0ull >> 1, ~0ull};
    for (uint64_t left = chance(4); left && size; left--) {
        uint64_t at = chance(size), value = odd[chance(sizeof odd / sizeof *odd)], width = 1ull << chance(4);
        switch (chance(6)) {
        case 0:
            bytes[at] ^= (unsigned char)(1 << chance(8));
            break;
        case 1:
        case 2:
            at = at / 4 * 4;
            memcpy(bytes + at, &value, width < size - at ? width : size - at);
            break;
        case 3:
            size = chance(8) ? size : at;
            break;
        case 4:
            if (!chance(8) && size + 8 < room) {
                memmove(bytes + at + 8, bytes + at, size - at);
                memcpy(bytes + at, &value, 8);
                size += 8;
            }
            break;
        default:
            bytes[at] = (unsigned char)chance(256);
        }
    }
    return size;
}

static void make(pd_transport **out)
{
    pd_options options = {.threads = 1, .host = "127.0.0.1", .advertise = "127.0.0.1"};
    pd_grid grid = {0, 0, GUARD, STRIDE, BLOCK, BLOCKS};
    pd_region region = {.address = (uint64_t)(uintptr_t)memory, .length = sizeof memory, .fd = -1};
    assert(!pd_open("tcp", &options, out));
    assert(!pd_register(*out, &region, 1, &grid, 1));
}

static int dial(const tcp_where *where)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(where->at.port)};
    struct linger reset = {1, 0}; /* no port may wait here when this end closes first */
    memcpy(&address.sin_addr, where->at.address, 4);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(fd >= 0 && !connect(fd, (struct sockaddr *)&address, sizeof address));
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    return fd;
}

static size_t good_request(unsigned char *out, uint64_t serial)
{
    uint32_t pieces = 1 + (uint32_t)chance(4);
    request head = {.serial = serial, .number = 1, .epoch = 1, .pieces = pieces, .capability_bytes = sizeof CAPABILITY};
    memcpy(head.capability, CAPABILITY, sizeof CAPABILITY);
    for (uint32_t i = 0; i < pieces; i++) {
        wire_piece piece = {0, chance(2) ? 0 : chance(BLOCK / 2), 0, (uint32_t)chance(LEASED), 1};
        piece.bytes = 1 + chance(BLOCK - piece.offset);
        piece.blocks = 1 + (uint32_t)chance(LEASED - piece.block);
        head.bytes += (uint32_t)piece.bytes * piece.blocks;
        memcpy(out + sizeof head + i * sizeof piece, &piece, sizeof piece);
    }
    memcpy(out, &head, sizeof head);
    return sizeof head + pieces * sizeof(wire_piece);
}

/* What comes until the other end hangs up: a greeting, then answers of which each byte is a leased one's. */
static uint64_t drain(int fd, uint64_t expected)
{
    static unsigned char got[1 << 22];
    size_t size = 0;
    for (;;) {
        struct pollfd readable = {fd, POLLIN, 0};
        assert(poll(&readable, 1, 20000) == 1);
        ssize_t more = read(fd, got + size, sizeof got - size);
        if (more <= 0)
            break;
        size += (size_t)more;
        assert(size < sizeof got);
    }
    uint64_t served = 0;
    for (size_t at = sizeof(greeting); at + sizeof(answer) <= size;) {
        answer head;
        memcpy(&head, got + at, sizeof head);
        at += sizeof head;
        assert(head.bytes <= PD_SLICE_BYTES && head.status <= PD_ERROR);
        for (size_t k = 0; head.status == PD_DONE && k < head.bytes && at + k < size; k++)
            assert(got[at + k] == LEASED_BYTE);
        at += head.bytes;
        served += head.status == PD_DONE && at <= size;
    }
    assert(served >= expected);
    return served;
}

static uint64_t hostile_readers(uint64_t messages)
{
    static unsigned char out[ROOM + 8192];
    pd_transport *owner;
    tcp_where where;
    memset(memory, 0x11, sizeof memory);
    for (size_t block = 0; block < LEASED; block++)
        memset(memory + GUARD + block * STRIDE, LEASED_BYTE, BLOCK);
    make(&owner);
    uint32_t ids[LEASED];
    for (uint32_t i = 0; i < LEASED; i++)
        ids[i] = i;
    pd_blocks blocks = {ids, LEASED, 0};
    pd_lease lease = {1, 1, CAPABILITY, sizeof CAPABILITY};
    assert(!pd_grant(owner, &lease, &blocks, 1));
    assert(pd_describe(owner, (unsigned char *)&where, sizeof where) == sizeof where);
    greeting hello;
    memcpy(hello.magic, where.magic, sizeof hello.magic);
    memcpy(hello.instance, where.instance, sizeof hello.instance);
    uint64_t sent = 0, served = 0;
    for (uint64_t round = 0; sent < messages; round++) {
        bool good = round % 16 == 15;
        size_t size = sizeof hello;
        memcpy(out, &hello, sizeof hello);
        if (!good && !chance(16))
            size = mutate(out, size, size + 8);
        for (int i = 0; i < BATCH; i++, sent++) {
            size_t bytes = good_request(out + size, (uint64_t)i);
            size += good ? bytes : mutate(out + size, bytes, 4096);
        }
        int fd = dial(&where);
        for (size_t at = 0; at < size;) {
            ssize_t step = send(fd, out + at, size - at, MSG_NOSIGNAL);
            if (step <= 0)
                break; /* it hung up */
            at += (size_t)step;
        }
        shutdown(fd, SHUT_WR);
        served += drain(fd, good ? BATCH : 0);
        close(fd);
    }
    pd_close(owner);
    return served;
}

/* --- hostile owners ----------------------------------------------------------------------------------------------- */

static int listener;
static atomic_bool over;
static uint64_t answered;

static void *hostile_owner(void *argument)
{
    const tcp_where *where = argument;
    state = seed * 0xD1B54A32D192ED03u | 1;
    static unsigned char in[65536], out[ROOM];
    while (!atomic_load(&over)) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        struct linger reset = {1, 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        greeting hello;
        ssize_t got = recv(fd, &hello, sizeof hello, MSG_WAITALL);
        memcpy(hello.instance, where->instance, sizeof hello.instance);
        size_t size = sizeof hello;
        memcpy(out, &hello, size);
        bool going = chance(64);
        if (!going) /* and no more: else the reader would wait for the rest, as it should */
            size = mutate(out, size, size + 8);
        if (got == sizeof hello)
            send(fd, out, size, MSG_NOSIGNAL);
        while (going && recv(fd, in, sizeof(request), MSG_WAITALL) == sizeof(request)) {
            request head;
            memcpy(&head, in, sizeof head);
            if (recv(fd, in, head.pieces * sizeof(wire_piece), MSG_WAITALL) != (ssize_t)(head.pieces * sizeof(wire_piece)))
                break;
            bool refuse = !chance(4);
            answer reply = {head.serial, refuse ? PD_NOT_GRANTED : PD_DONE, refuse ? 20 : head.bytes};
            memcpy(out, &reply, sizeof reply);
            memset(out + sizeof reply, LEASED_BYTE, reply.bytes);
            size = sizeof reply + reply.bytes;
            size_t bad = chance(4) ? size : mutate(out, size < 64 ? size : 64, 72) + (size < 64 ? 0 : size - 64);
            going = bad == size && !memcmp(out, &reply, sizeof reply);
            answered++;
            if (send(fd, out, bad, MSG_NOSIGNAL) < 0)
                break;
        }
        close(fd);
    }
    return NULL;
}

static uint64_t hostile_owners(uint64_t messages)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(!bind(listener, (struct sockaddr *)&address, size) && !listen(listener, 64));
    assert(!getsockname(listener, (struct sockaddr *)&address, &size));
    tcp_where where = {.at = {.family = 4, .port = ntohs(address.sin_port)}, .instance = "an owner's"};
    memcpy(where.magic, tcp_magic, sizeof where.magic);
    memcpy(where.at.address, &address.sin_addr, 4);
    pthread_t thread;
    assert(!pthread_create(&thread, NULL, hostile_owner, &where));
    pd_transport *reader;
    make(&reader);
    uint64_t tag = 0, done = 0, peer = 0;
    bool connected = false;
    while (tag < messages) {
        if (!connected)
            assert(!pd_connect(reader, ++peer, "owner", (unsigned char *)&where, sizeof where, ++tag));
        pd_run run = {0, 2, 8};
        pd_pattern pattern = {0, 0, 0, 0, BLOCK / 8, {{8, BLOCK / 8, BLOCK / 8}, {1, 0, 0}, {1, 0, 0}}};
        pd_plan plan = {&run, &pattern, 1, 1, 1, 1};
        pd_lease lease = {1, 1, CAPABILITY, sizeof CAPABILITY};
        uint64_t first = tag;
        memset(memory, 0x11, sizeof memory);
        if (connected)
            assert(!pd_post_read(reader, peer, &lease, &plan, ++tag, 0));
        pd_completion end;
        do {
            struct pollfd bell = {pd_fileno(reader), POLLIN, 0};
            assert(poll(&bell, 1, 20000) == 1);
        } while (!pd_poll(reader, &end, 1));
        assert(end.tag == tag);
        bool lost = end.status != PD_DONE && end.status != PD_NOT_GRANTED && end.status != PD_ERROR;
        for (size_t at = 0; connected && at < sizeof memory; at++) {
            size_t block = at < GUARD ? 0 : (at - GUARD) / STRIDE;
            bool ours = at >= GUARD && block >= 2 && block < 10 && (at - GUARD) % STRIDE < BLOCK;
            assert(ours || memory[at] == 0x11);
        }
        done += tag > first && end.status == PD_DONE;
        connected = !lost && (connected || end.status == PD_DONE);
        if (lost)
            assert(!pd_disconnect(reader, peer));
    }
    atomic_store(&over, true);
    pd_close(reader);
    shutdown(listener, SHUT_RDWR);
    pthread_join(thread, NULL);
    close(listener);
    return done;
}

/* --- inputs: bytes sent as they are, behind a good greeting -------------------------------------------------------- */

static pd_transport *input_owner, *input_reader;
static tcp_where input_owner_where, input_reader_where;

static void prepare(void)
{
    pd_blocks blocks = {(const uint32_t[]){0, 1, 2, 3, 4, 5, 6, 7}, LEASED, 0};
    pd_lease lease = {1, 1, CAPABILITY, sizeof CAPABILITY};
    make(&input_owner);
    make(&input_reader);
    assert(!pd_grant(input_owner, &lease, &blocks, 1));
    assert(pd_describe(input_owner, (unsigned char *)&input_owner_where, sizeof input_owner_where) > 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(!bind(listener, (struct sockaddr *)&address, size) && !listen(listener, 64));
    assert(!getsockname(listener, (struct sockaddr *)&address, &size));
    input_reader_where = (tcp_where){.at = {.family = 4, .port = ntohs(address.sin_port)}, .instance = "an owner's"};
    memcpy(input_reader_where.magic, tcp_magic, sizeof tcp_magic);
    memcpy(input_reader_where.at.address, &address.sin_addr, 4);
}

static void send_all(int fd, const void *bytes, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t step = send(fd, (const char *)bytes + at, size - at, MSG_NOSIGNAL);
        if (step <= 0)
            return; /* it hung up */
        at += (size_t)step;
    }
}

static void input_to_owner(const unsigned char *data, size_t size)
{
    memset(memory, 0x11, sizeof memory);
    for (size_t block = 0; block < LEASED; block++)
        memset(memory + GUARD + block * STRIDE, LEASED_BYTE, BLOCK);
    greeting hello;
    memcpy(hello.magic, tcp_magic, sizeof hello.magic);
    memcpy(hello.instance, input_owner_where.instance, sizeof hello.instance);
    int fd = dial(&input_owner_where);
    send_all(fd, &hello, sizeof hello);
    send_all(fd, data, size);
    shutdown(fd, SHUT_WR);
    drain(fd, 0);
    close(fd);
}

static pd_status ended(uint64_t tag)
{
    pd_completion end;
    do {
        struct pollfd bell = {pd_fileno(input_reader), POLLIN, 0};
        assert(poll(&bell, 1, 20000) == 1);
    } while (!pd_poll(input_reader, &end, 1));
    assert(end.tag == tag);
    return end.status;
}

static void input_to_reader(const unsigned char *data, size_t size)
{
    static uint64_t peer, tag;
    memset(memory, 0x11, sizeof memory);
    pd_run run = {0, 2, 8};
    pd_pattern pattern = {0, 0, 0, 0, BLOCK, {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}}};
    pd_plan plan = {&run, &pattern, 1, 1, 1, 1};
    pd_lease lease = {1, 1, CAPABILITY, sizeof CAPABILITY};
    greeting hello;
    assert(!pd_connect(input_reader, ++peer, "owner", (unsigned char *)&input_reader_where, sizeof input_reader_where, ++tag));
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    assert(fd >= 0 && recv(fd, &hello, sizeof hello, MSG_WAITALL) == sizeof hello);
    send_all(fd, &hello, sizeof hello);
    assert(ended(tag) == PD_DONE);
    assert(!pd_post_read(input_reader, peer, &lease, &plan, ++tag, 0));
    request head;
    assert(recv(fd, &head, sizeof head, MSG_WAITALL) == sizeof head); /* its pieces stay unread */
    send_all(fd, data, size);
    shutdown(fd, SHUT_WR);
    ended(tag);
    close(fd);
    for (size_t at = 0; at < sizeof memory; at++) {
        size_t block = at < GUARD ? 0 : (at - GUARD) / STRIDE;
        bool ours = at >= GUARD && block >= 2 && block < 10 && (at - GUARD) % STRIDE < BLOCK;
        assert(ours || memory[at] == 0x11);
    }
    assert(!pd_disconnect(input_reader, peer));
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size)
{
    /* libFuzzer's timer interrupts whoever waits, and every wait here has an end of its own. */
    sigset_t timer;
    sigemptyset(&timer);
    sigaddset(&timer, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &timer, NULL);
    if (!input_owner)
        prepare();
    if (size && data[0] & 1)
        input_to_reader(data + 1, size - 1);
    else if (size)
        input_to_owner(data + 1, size - 1);
    pthread_sigmask(SIG_UNBLOCK, &timer, NULL);
    return 0;
}

#ifndef LIBFUZZER
static void replay(const char *path)
{
    static unsigned char bytes[1 << 16];
    FILE *file = fopen(path, "rb");
    assert(file);
    size_t size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    LLVMFuzzerTestOneInput(bytes, size);
}

int main(int count, char **words)
{
    uint64_t messages = count > 1 ? strtoull(words[1], NULL, 10) : 100000;
    seed = count > 2 ? strtoull(words[2], NULL, 10) : 1;
    state = seed * 0x9E3779B97F4A7C15u | 1;
    for (int i = 3; i < count; i++)
        replay(words[i]);
    if (input_owner) {
        pd_close(input_owner);
        pd_close(input_reader);
        close(listener);
    }
    uint64_t served = hostile_readers(messages - messages / 8);
    uint64_t done = hostile_owners(messages / 8);
    assert(served && done);
    printf("fuzz_tcp: %llu messages, seed %llu: %llu requests served, %llu reads done, %d inputs replayed\n",
           (unsigned long long)messages, seed, (unsigned long long)served, (unsigned long long)done, count > 3 ? count - 3 : 0);
    return 0;
}
#endif
