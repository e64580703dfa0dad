/* The native data plane without Python, for the sanitizers: every copier, and reads over a backend with everything that
 * can happen to them, many at once. Every byte that was promised is compared. */

#include "../../csrc/device.h"
#include "../../csrc/hixl_engine.h"
#include "../../csrc/pd.h"
#include "../../csrc/verbs.h"

#include <dlfcn.h>
#include <poll.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>


#define assert(true_) ((true_) ? (void)0 : (fprintf(stderr, "%s:%d: not so: %s (%s; %s)\n", __FILE__, __LINE__, #true_, pd_last_error(), latest.words), abort()))

enum { LAYERS = 3, BLOCKS = 64, BLOCK = 24 * 1024 + 64, PARTS = 14, STRIDE = BLOCK + 4096, READERS = 3, ROUNDS = 200 };

static const char *backend;
static pd_completion latest; /* for messages */
static unsigned writes;
static const unsigned char CAPABILITY[16] = "sixteen bytes...";
static const uint64_t WHOLE = (uint64_t)LAYERS * BLOCKS * STRIDE;

static unsigned char byte_of(uint64_t at)
{
    return (unsigned char)((at * 0x9E3779B97F4A7C15u) >> 56 | 1);
}

static void copiers(void)
{
    static unsigned char from[5000], to[5200];
    for (int i = 0; i < pd_copier_count(); i++)
        for (size_t bytes = 0; pd_copier_name(i) && bytes < 4000; bytes += bytes < 700 ? 1 : 97)
            for (size_t shift = 0; shift < 67; shift += 11) {
                for (size_t k = 0; k < sizeof from; k++)
                    from[k] = byte_of(k + bytes);
                memset(to, 0, sizeof to);
                pd_copy_with(i, to + 100 + shift, from + shift / 2, bytes);
                assert(!memcmp(to + 100 + shift, from + shift / 2, bytes));
                for (size_t k = 0; k < sizeof to; k++)
                    assert((k >= 100 + shift && k < 100 + shift + bytes) || !to[k]);
            }
}

enum { MOVES = 100, MOVED = 5000, MOVERS = 4 };

/* Bytes out to a device and back in another order, as others do at the same time on the same one. */
static void *mover(void *argument)
{
    pd_device *device = argument;
    unsigned char *from = calloc(MOVES, MOVED), *to = calloc(MOVES, MOVED);
    uint64_t there;
    assert(from && to && !pd_device_alloc(device, MOVES * MOVED, &there));
    assert(!pd_device_pin(device, (uint64_t)(uintptr_t)from, MOVES * MOVED));
    assert(!pd_device_pin(device, (uint64_t)(uintptr_t)to, MOVES * MOVED));
    pd_move out[MOVES], back[MOVES];
    for (uint64_t i = 0; i < MOVES; i++) {
        uint64_t there_at = there + (MOVES - 1 - i) * MOVED;
        out[i] = (pd_move){there_at, (uint64_t)(uintptr_t)from + i * MOVED, MOVED};
        back[i] = (pd_move){(uint64_t)(uintptr_t)to + i * MOVED, there_at, MOVED};
    }
    for (uint64_t at = 0; at < MOVES * MOVED; at++)
        from[at] = byte_of(at + there);
    assert(!pd_device_move(device, out, MOVES, PD_TO_DEVICE) && !pd_device_move(device, back, MOVES, PD_TO_HOST));
    assert(!memcmp(from, to, MOVES * MOVED));
    pd_device_unpin(device, (uint64_t)(uintptr_t)from);
    pd_device_unpin(device, (uint64_t)(uintptr_t)to);
    pd_device_release(device, there);
    free(from);
    free(to);
    return NULL;
}

static void devices(const char *kind)
{
    pd_device *device = NULL;
    uint64_t at;
    assert(pd_device_probe("none") < 0 && pd_device_open(kind, 9, &device) < 0 && !device);
    assert(!pd_device_probe(kind) && !pd_device_open(kind, -1, &device));
    assert(pd_device_alloc(device, 0, &at) < 0 && pd_device_pin(device, 0, 1) < 0);
    assert(!pd_device_move(device, NULL, 0, PD_ON_DEVICE));
    pthread_t threads[MOVERS];
    for (int i = 0; i < MOVERS; i++)
        assert(!pthread_create(&threads[i], NULL, mover, device));
    for (int i = 0; i < MOVERS; i++)
        pthread_join(threads[i], NULL);
    pd_device_close(device);
}

typedef struct {
    pd_transport *transport;
    unsigned char *bytes;
    uint64_t at; /* of the bytes, for the backend */
} agent;

static bool on_npu(void)
{
    return !strcmp(backend, "hixl") || !strcmp(backend, "hccl");
}

/* Host memory counts as an emulated NPU's, or not any more. */
static void adopt(void *at, bool adopted)
{
    void *library = dlopen("libascendcl.so", RTLD_NOW);
    assert(library);
    int (*change)(void *, size_t) = (int (*)(void *, size_t))dlsym(library, adopted ? "emu_adopt" : "emu_disown");
    assert(change && !change(at, WHOLE));
}

static bool on_gpu(void)
{
    return !strcmp(backend, "cuda");
}

static void *cuda_function(const char *name)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW), *found = library ? dlsym(library, name) : NULL;
    assert(found);
    return found;
}

/* Memory of an emulated GPU, in its primary context, and where the processor sees it. */
static void gpu_alloc(agent *made)
{
    void *context;
    int (*init)(unsigned) = (int (*)(unsigned))cuda_function("cuInit");
    int (*retain)(void **, int) = (int (*)(void **, int))cuda_function("cuDevicePrimaryCtxRetain");
    int (*enter)(void *) = (int (*)(void *))cuda_function("cuCtxSetCurrent");
    int (*alloc)(uint64_t *, size_t) = (int (*)(uint64_t *, size_t))cuda_function("cuMemAlloc_v2");
    void *(*alias)(uint64_t) = (void *(*)(uint64_t))cuda_function("emu_alias");
    assert(!init(0) && !retain(&context, 0) && !enter(context) && !alloc(&made->at, WHOLE));
    made->bytes = alias(made->at);
}

static void gpu_free(const agent *each)
{
    int (*release)(uint64_t) = (int (*)(uint64_t))cuda_function("cuMemFree_v2");
    assert(!release(each->at));
}

static void unmake(agent *each)
{
    pd_close(each->transport);
    if (on_gpu()) {
        gpu_free(each);
        return;
    }
    if (on_npu())
        adopt(each->bytes, false);
    munmap(each->bytes, WHOLE);
}

static agent make(bool pooled, bool filled)
{
    agent made;
    int fd = pooled ? memfd_create("pool", MFD_CLOEXEC | MFD_ALLOW_SEALING) : -1;
    assert(!pooled || !ftruncate(fd, WHOLE));
    if (on_gpu()) {
        gpu_alloc(&made);
    } else {
        made.bytes = mmap(NULL, WHOLE, PROT_READ | PROT_WRITE, pooled ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
        assert(made.bytes != MAP_FAILED);
        made.at = (uint64_t)(uintptr_t)made.bytes;
    }
    if (pooled) {
        assert(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
    }
    for (uint64_t at = 0; filled && at < WHOLE; at++)
        made.bytes[at] = byte_of(at);
    pd_grid grids[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        grids[i] = (pd_grid){0, 0, (uint64_t)i * BLOCKS * STRIDE, STRIDE, BLOCK, BLOCKS};
    uint32_t flags = on_npu() || on_gpu() ? PD_OF_DEVICE : 0;
    pd_region region = {made.at, WHOLE, fd, flags, 0, pooled ? WHOLE : 0, 0, 0};
    if (on_npu())
        adopt(made.bytes, true);
    pd_options options = {.threads = 3, .host = "127.0.0.1", .advertise = "127.0.0.1"};
    verbs_settings settings = { /* of a guest with Soft-RoCE */
        .num_rails = 1, .queues = 2, .timeout = 14, .retries = 6, .max_reads = 16, .relaxed = 1, .max_mr_bytes = 1 << 20,
        .write = writes, .rails = {{"rxe0", 1, 1}}};
    if (!strcmp(backend, "verbs"))
        options.settings = &settings, options.settings_bytes = sizeof settings;
    hixl_settings hixl = {-1, 500, 500, "0:0"};
    if (!strcmp(backend, "hixl"))
        options.settings = &hixl, options.settings_bytes = sizeof hixl;
    uint32_t transfer_ms = 500; /* all that hccl and cuda are told */
    if (!strcmp(backend, "hccl") || on_gpu())
        options.settings = &transfer_ms, options.settings_bytes = sizeof transfer_ms;
    assert(!pd_open(backend, &options, &made.transport));
    assert(!pd_register(made.transport, &region, 1, grids, LAYERS));
    return made;
}

static void lend(pd_transport *transport, uint64_t epoch, uint32_t from)
{
    uint32_t ids[BLOCKS];
    for (uint32_t i = from; i < BLOCKS; i++)
        ids[i - from] = i;
    pd_blocks blocks = {ids, BLOCKS - from, 0};
    pd_lease lease = {1, epoch, CAPABILITY, sizeof CAPABILITY};
    assert(!pd_grant(transport, &lease, &blocks, 1));
}

static pd_completion wait_for(pd_transport *transport, uint64_t tag)
{
    pd_completion got;
    for (;;) {
        struct pollfd bell = {pd_fileno(transport), POLLIN, 0};
        assert(poll(&bell, 1, 20000) == 1);
        if (pd_poll(transport, &got, 1) && got.tag == tag)
            return got;
    }
}

static int post(pd_transport *transport, uint64_t epoch, uint32_t src, uint32_t dst, uint32_t count, uint64_t tag)
{
    pd_run run = {src, dst, count};
    pd_pattern patterns[LAYERS];
    for (uint64_t i = 0; i < LAYERS; i++)
        patterns[i] = (pd_pattern){i, i, 0, 0, BLOCK / PARTS, {{PARTS, BLOCK / PARTS, BLOCK / PARTS}, {1, 0, 0}, {1, 0, 0}}};
    if (tag % 3) /* whole blocks, or the same bytes as short runs, which come as spans */
        for (uint64_t i = 0; i < LAYERS; i++)
            patterns[i].bytes = BLOCK, patterns[i].dims[0].count = 1;
    pd_lease lease = {1, epoch, CAPABILITY, sizeof CAPABILITY};
    pd_plan plan = {&run, patterns, 1, LAYERS, 1, 1};
    return pd_post_read(transport, 1, &lease, &plan, tag, (int)(tag % 2));
}

static void same(const agent *reader, uint32_t src, uint32_t dst, uint32_t count)
{
    for (uint64_t layer = 0; layer < LAYERS; layer++)
        for (uint64_t k = 0; k < count; k++)
            for (uint64_t at = 0; at < BLOCK; at++)
                assert(reader->bytes[(layer * BLOCKS + dst + k) * STRIDE + at] ==
                       byte_of((layer * BLOCKS + src + k) * STRIDE + at));
}

static void *owner_life(void *argument)
{
    pd_transport *transport = argument;
    for (uint64_t epoch = 2; epoch < 400; epoch++) {
        lend(transport, epoch, (uint32_t)epoch % 8);
        usleep(200);
        assert(!pd_revoke(transport, 1, epoch));
    }
    return NULL;
}

static void *reader_life(void *argument)
{
    pd_transport *owner = argument;
    unsigned seed = (unsigned)(uintptr_t)&seed;
    agent reader = make(false, false);
    unsigned char where[PD_MAX_DESCRIPTION];
    int bytes = pd_describe(owner, where, sizeof where);
    uint64_t tag = 1, done = 0;
    assert(bytes > 0);
    assert(!pd_can_reach(reader.transport, where, (size_t)bytes));
    assert(!pd_connect(reader.transport, 1, "owner", where, (size_t)bytes, ++tag));
    assert(wait_for(reader.transport, tag).status == PD_DONE);
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t src = (uint32_t)rand_r(&seed) % BLOCKS, dst = (uint32_t)rand_r(&seed) % BLOCKS;
        uint32_t most = BLOCKS - (src > dst ? src : dst), count = 1 + (uint32_t)rand_r(&seed) % most;
        uint64_t epoch = rand_r(&seed) % 4 ? 1 : 2 + (unsigned)rand_r(&seed) % 398;
        uint64_t first = ++tag;
        assert(!post(reader.transport, epoch, src, dst, count, first));
        assert(post(reader.transport, epoch, src, dst, count, first) < 0);
        pd_completion end;
        switch (rand_r(&seed) % 5) {
        case 0:
            assert(!pd_cancel(reader.transport, first));
            break;
        case 1:
            assert(!pd_fence(reader.transport, 1, ++tag));
            break;
        case 2:
            if (dst) /* blocks that the first read does not write to */
                assert(!post(reader.transport, 1, src, 0, 1, ++tag));
            break;
        case 3:
            assert(!pd_disconnect(reader.transport, 1));
            assert(!pd_connect(reader.transport, 1, "owner", where, (size_t)bytes, ++tag));
            break;
        default:
            break;
        }
        for (uint64_t left = tag - first + 1; left;) {
            struct pollfd bell = {pd_fileno(reader.transport), POLLIN, 0};
            assert(poll(&bell, 1, 20000) == 1);
            if (!pd_poll(reader.transport, &end, 1))
                continue;
            left--;
            assert(end.status == PD_DONE || end.status == PD_CANCELLED || (epoch != 1 && end.status == PD_NOT_GRANTED));
            if (end.tag == first && end.status == PD_DONE) {
                same(&reader, src, dst, count);
                done++;
            }
        }
    }
    assert(done > ROUNDS / 8);
    unmake(&reader);
    return NULL;
}

static void live(bool pooled)
{
    agent owner = make(pooled, true);
    pthread_t threads[READERS + 1];
    lend(owner.transport, 1, 0);
    pthread_create(&threads[READERS], NULL, owner_life, owner.transport);
    for (int i = 0; i < READERS; i++)
        pthread_create(&threads[i], NULL, reader_life, owner.transport);
    for (int i = 0; i <= READERS; i++)
        pthread_join(threads[i], NULL);
    unmake(&owner);
}

/* An owner in another process; its description comes to `where`. */
static pid_t spawn(bool pooled, unsigned char where[PD_MAX_DESCRIPTION], ssize_t *bytes)
{
    int pipes[2];
    assert(!pipe(pipes));
    pid_t child = fork();
    if (!child) {
        agent owner = make(pooled, true);
        lend(owner.transport, 1, 0);
        int size = pd_describe(owner.transport, where, PD_MAX_DESCRIPTION);
        assert(write(pipes[1], where, (size_t)size) == size);
        pause();
        _exit(0);
    }
    *bytes = read(pipes[0], where, PD_MAX_DESCRIPTION);
    close(pipes[0]);
    close(pipes[1]);
    return child;
}

/* An owner that is killed while it is read: every read ends, and the peer is lost. */
static void killed(bool pooled)
{
    unsigned char where[PD_MAX_DESCRIPTION];
    ssize_t bytes;
    pid_t child = spawn(pooled, where, &bytes);
    agent reader = make(false, false);
    assert(bytes > 0 && !pd_connect(reader.transport, 1, "owner", where, (size_t)bytes, 1));
    assert(wait_for(reader.transport, 1).status == PD_DONE);
    for (uint64_t tag = 2; tag < 40; tag++) {
        assert(!post(reader.transport, 1, 0, 0, BLOCKS, tag));
        if (tag == 20) {
            kill(child, 9);
            waitpid(child, NULL, 0);
        }
        pd_status status = wait_for(reader.transport, tag).status;
        assert(tag < 20 ? status == PD_DONE : tag > 20 ? status == PD_PEER_LOST : status != PD_ERROR);
    }
    bool sees = !strcmp(backend, "shm"); /* whether somebody is there: over a network only a connection tells */
    assert(!sees || pd_can_reach(reader.transport, where, (size_t)bytes) < 0);
    for (size_t at = 0; at < (size_t)bytes; at++) { /* descriptions with one wrong byte, shorter ones */
        where[at] ^= 0x41;
        assert(!sees || pd_can_reach(reader.transport, where, (size_t)bytes) < 0);
        assert(pd_can_reach(reader.transport, where, at) < 0);
        where[at] ^= 0x41;
    }
    unmake(&reader);
}

/* An owner that stands still: reads of it can be cancelled and fenced, and their destination is quiet then, also when it
 * goes on. A one-sided backend reads on. */
static void stopped(bool pooled)
{
    unsigned char where[PD_MAX_DESCRIPTION];
    ssize_t bytes;
    pid_t child = spawn(pooled, where, &bytes);
    agent reader = make(false, false);
    assert(!pd_connect(reader.transport, 1, "owner", where, (size_t)bytes, 1));
    assert(wait_for(reader.transport, 1).status == PD_DONE);
    for (uint64_t tag = 10; tag < 200; tag += 10) {
        memset(reader.bytes, 0, WHOLE);
        for (uint64_t k = 0; k < 4; k++)
            assert(!post(reader.transport, 1, (uint32_t)k * 16, (uint32_t)k * 16, 16, tag + k));
        usleep((useconds_t)tag * 20);
        kill(child, SIGSTOP);
        pd_completion end;
        int taken = 0;
        if (tag % 20)
            for (uint64_t k = 0; k < 4; k++)
                assert(!pd_cancel(reader.transport, tag + k));
        else
            assert(!pd_fence(reader.transport, 1, tag + 5));
        for (int whole = tag % 20 ? 4 : 5; taken < whole;) {
            struct pollfd bell = {pd_fileno(reader.transport), POLLIN, 0};
            assert(poll(&bell, 1, 10000) == 1);
            if (!pd_poll(reader.transport, &end, 1))
                continue;
            latest = end;
            assert(end.status == PD_DONE || end.status == PD_CANCELLED);
            if (end.status == PD_DONE && end.tag < tag + 4)
                same(&reader, (uint32_t)(end.tag - tag) * 16, (uint32_t)(end.tag - tag) * 16, 16);
            taken++;
        }
        memset(reader.bytes, 0, WHOLE);
        kill(child, SIGCONT);
        usleep(20000);
        for (uint64_t at = 0; at < WHOLE; at++)
            assert(!reader.bytes[at]);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    unmake(&reader);
}

/* stress [foreign] [pooled] [tcp]: all of them when none is named. */
int main(int count, char **words)
{
    static const struct {
        const char *name, *backend;
        bool unnamed; /* runs also when nothing is named */
    } rounds[] = {{"foreign", "shm", true}, {"pooled", "shm", true}, {"tcp", "tcp", true}, {"verbs", "verbs", false},
                  {"verbs-write", "verbs", false}, {"hixl", "hixl", false}, {"hccl", "hccl", false},
                  {"cuda", "cuda", false}};
    copiers();
    devices("cpu");
    for (size_t round = 0; round < sizeof rounds / sizeof *rounds; round++) {
        bool named = count == 1 && rounds[round].unnamed;
        for (int i = 1; i < count; i++)
            named |= !strcmp(words[i], rounds[round].name);
        if (!named)
            continue;
        printf("stress: %s\n", rounds[round].name);
        fflush(stdout);
        backend = rounds[round].backend;
        writes = !strcmp(rounds[round].name, "verbs-write");
        bool pooled = !strcmp(rounds[round].name, "pooled");
        /* On NPUs a call that is under way times out, and then the peer is lost; who has used CUDA cannot fork again. */
        if (!on_npu() && !on_gpu())
            stopped(pooled);
        killed(pooled);
        live(pooled);
        if (on_gpu() || on_npu())
            devices(on_gpu() ? "cuda" : "acl");
    }
    puts("stress: all bytes right");
    return 0;
}
