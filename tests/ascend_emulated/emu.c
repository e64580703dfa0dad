/* Faults, counters, the recent error and sockets with deadlines; see emu.h. */

#include "emu.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define MAX_RULES 64
#define MAX_NAMES 128
#define NAME_BYTES 48

typedef struct {
    char name[NAME_BYTES];
    uint64_t nth; /* 0: every call */
    int delay_ms;
    int code;
    bool delays;
} rule;

typedef struct {
    char name[NAME_BYTES];
    uint64_t calls;
} counter;

static struct {
    pthread_mutex_t lock;
    rule rules[MAX_RULES];
    counter counters[MAX_NAMES];
    int rule_count, counter_count;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local char recent[256];
static _Thread_local char taken[256];

static bool parse_number(const char *text, long *number)
{
    char *end;
    errno = 0;
    *number = strtol(text, &end, 0);
    return end != text && !*end && !errno && *number >= INT_MIN && *number <= INT_MAX;
}

/* One "name:nth=code"; the text is taken apart in place. */
static bool parse_rule(char *text, rule *into)
{
    char *colon = strchr(text, ':');
    char *equals = colon ? strchr(colon, '=') : NULL;
    long nth = 0, value;
    if (!equals || colon == text || colon - text >= NAME_BYTES)
        return false;
    *colon = *equals = 0;
    into->delays = equals[1] == '~';
    if (strcmp(colon + 1, "*") && (!parse_number(colon + 1, &nth) || nth < 1))
        return false;
    if (!parse_number(equals + 1 + into->delays, &value) || (into->delays && value < 0))
        return false;
    strcpy(into->name, text);
    into->nth = (uint64_t)nth;
    *(into->delays ? &into->delay_ms : &into->code) = (int)value;
    return true;
}

int emu_faults(const char *spec)
{
    static rule rules[MAX_RULES];
    char *copy = strdup(spec ? spec : ""), *rest = copy, *word;
    int count = 0, result = copy ? 0 : -1;
    pthread_mutex_lock(&table.lock);
    while (!result && (word = strsep(&rest, ";"))) {
        if (!*word)
            continue;
        if (count == MAX_RULES || !parse_rule(word, &rules[count++]))
            result = -1;
    }
    if (!result) {
        memcpy(table.rules, rules, sizeof rules);
        table.rule_count = count;
        table.counter_count = 0;
    }
    pthread_mutex_unlock(&table.lock);
    free(copy);
    return result;
}

/* NULL for a name that was never called and is not to be added. */
static counter *counter_of(const char *name, bool add)
{
    for (int i = 0; i < table.counter_count; i++)
        if (!strcmp(table.counters[i].name, name))
            return &table.counters[i];
    if (!add || table.counter_count == MAX_NAMES || strlen(name) >= NAME_BYTES)
        return NULL;
    counter *added = &table.counters[table.counter_count++];
    strcpy(added->name, name);
    added->calls = 0;
    return added;
}

uint64_t emu_calls(const char *name)
{
    pthread_mutex_lock(&table.lock);
    counter *found = counter_of(name, false);
    uint64_t calls = found ? found->calls : 0;
    pthread_mutex_unlock(&table.lock);
    return calls;
}

static void sleep_ms(int ms)
{
    struct timespec left = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

bool emu_fault(const char *name, int *code)
{
    bool fails = false;
    int delay = 0;
    pthread_mutex_lock(&table.lock);
    counter *counted = counter_of(name, true);
    uint64_t nth = counted ? ++counted->calls : 0;
    for (int i = 0; i < table.rule_count; i++) {
        const rule *each = &table.rules[i];
        if (strcmp(each->name, name) || (each->nth && each->nth != nth))
            continue;
        if (each->delays)
            delay += each->delay_ms;
        else
            *code = each->code, fails = true;
    }
    pthread_mutex_unlock(&table.lock);
    if (delay)
        sleep_ms(delay);
    if (fails)
        emu_fail(*code, "an injected fault");
    return fails;
}

int emu_fail(int code, const char *why)
{
    snprintf(recent, sizeof recent, "E%d: %s", code, why);
    return code;
}

/* Valid until the thread's next call of it, as documented. */
const char *emu_failure(void)
{
    memcpy(taken, recent, sizeof taken);
    recent[0] = 0;
    return taken[0] ? taken : NULL;
}

int64_t emu_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t emu_deadline(int64_t ms)
{
    return ms < 0 ? EMU_NEVER : emu_now_ms() + ms;
}

int emu_wait(int fd, short events, int64_t deadline)
{
    for (;;) {
        int64_t left = deadline == EMU_NEVER ? -1 : deadline - emu_now_ms();
        struct pollfd poller = {fd, events, 0};
        if (deadline != EMU_NEVER && left < 0)
            left = 0;
        int ready = poll(&poller, 1, left > INT_MAX ? INT_MAX : (int)left);
        if (ready > 0)
            return 0;
        if (ready < 0 && errno != EINTR)
            return -1;
        if (!ready && deadline <= emu_now_ms()) {
            errno = ETIMEDOUT;
            return -1;
        }
    }
}

static bool is_passing(void)
{
    return errno == EINTR || errno == EAGAIN;
}

int emu_send(int fd, const void *bytes, size_t count, int64_t deadline)
{
    for (const char *at = bytes; count;) {
        if (emu_wait(fd, POLLOUT, deadline))
            return -1;
        ssize_t sent = send(fd, at, count, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && !is_passing())
            return -1;
        if (sent > 0)
            at += sent, count -= (size_t)sent;
    }
    return 0;
}

int emu_receive(int fd, void *bytes, size_t count, int64_t deadline)
{
    for (char *at = bytes; count;) {
        if (emu_wait(fd, POLLIN, deadline))
            return -1;
        ssize_t got = recv(fd, at, count, MSG_DONTWAIT);
        if (!got)
            errno = EPIPE;
        if (!got || (got < 0 && !is_passing()))
            return -1;
        if (got > 0)
            at += got, count -= (size_t)got;
    }
    return 0;
}

/* The locks may have been held by threads that the child does not have. */
static void forked(void)
{
    pthread_mutex_init(&table.lock, NULL);
    emu_memory_forked();
    emu_stream_forked();
    emu_context_forked();
}

__attribute__((constructor)) static void loaded(void)
{
    pthread_atfork(NULL, NULL, forked);
    const char *spec = getenv("ASCEND_EMU_FAULTS");
    if (spec && emu_faults(spec)) {
        fprintf(stderr, "ASCEND_EMU_FAULTS=%s is not name:nth=code;...\n", spec);
        abort();
    }
}
