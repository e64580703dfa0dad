/* What an engine that listens does: it answers remote engines out of its registered memory, a thread for each. */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "hixl.h"

namespace hixl {
namespace {
socklen_t Fill(const Address &address, sockaddr_storage &into)
{
    memset(&into, 0, sizeof into);
    if (address.is_v6) {
        auto *v6 = reinterpret_cast<sockaddr_in6 *>(&into);
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons(address.port);
        inet_pton(AF_INET6, address.host.c_str(), &v6->sin6_addr);
        return sizeof *v6;
    }
    auto *v4 = reinterpret_cast<sockaddr_in *>(&into);
    v4->sin_family = AF_INET;
    v4->sin_port = htons(address.port);
    inet_pton(AF_INET, address.host.c_str(), &v4->sin_addr);
    return sizeof *v4;
}

/* A remote engine that disconnected wants nothing written any more, whatever it sent before. */
bool HasHungUp(int fd)
{
    pollfd poller = {fd, POLLRDHUP, 0};
    return poll(&poller, 1, 0) != 0;
}
}  // namespace

bool Address::Parse(const char *text, Address &into)
{
    std::string name = text;
    size_t colon = name.rfind(':');
    bool is_bracketed = !name.empty() && name[0] == '[';
    bool has_port = colon != std::string::npos && (is_bracketed ? name[colon - 1] == ']' : name.find(':') == colon);
    into = Address();
    into.host = has_port ? name.substr(0, colon) : name;
    if (is_bracketed && into.host.back() == ']')
        into.host = into.host.substr(1, into.host.size() - 2);
    if (has_port) {
        char *end;
        const char *digits = name.c_str() + colon + 1;
        long port = strtol(digits, &end, 10);
        if (end == digits || *end != 0 || port < 1 || port > 65535)
            return false;
        into.port = static_cast<uint16_t>(port);
    }
    in6_addr parsed;
    into.is_v6 = into.host.find(':') != std::string::npos;
    return inet_pton(into.is_v6 ? AF_INET6 : AF_INET, into.host.c_str(), &parsed) == 1;
}

int Address::Listen() const
{
    sockaddr_storage bound;
    socklen_t length = Fill(*this, bound);
    int one = 1, fd = socket(bound.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, reinterpret_cast<sockaddr *>(&bound), length) == 0 && listen(fd, 128) == 0)
        return fd;
    close(fd);
    return -1;
}

int Address::Dial(int64_t deadline) const
{
    sockaddr_storage there;
    socklen_t length = Fill(*this, there);
    int one = 1, error = 0, fd = socket(there.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    socklen_t size = sizeof error;
    if (fd < 0)
        return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    bool is_on_its_way = connect(fd, reinterpret_cast<sockaddr *>(&there), length) == 0 || errno == EINPROGRESS;
    if (is_on_its_way && emu_wait(fd, POLLOUT, deadline) == 0 &&
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0)
        return fd;
    close(fd);
    return -1;
}

bool Thread::Start(void *(*run)(void *), void *argument)
{
    running_ = pthread_create(&thread_, nullptr, run, argument) == 0;
    return running_;
}

void Thread::Join()
{
    if (running_)
        pthread_join(thread_, nullptr);
    running_ = false;
}

bool Server::Start(const Address &address)
{
    stopping_ = false;
    listener_ = address.Listen();
    if (listener_ < 0)
        return false;
    return thread_.Start(
        [](void *self) -> void * {
            static_cast<Server *>(self)->Accept();
            return nullptr;
        },
        this);
}

/* Every remote engine loses its link. */
void Server::Stop()
{
    if (listener_ < 0)
        return;
    {
        std::lock_guard<std::mutex> held(lock_);
        stopping_ = true;
        for (auto &each : callers_)
            if (each->fd >= 0)
                shutdown(each->fd, SHUT_RDWR);
    }
    shutdown(listener_, SHUT_RDWR);
    thread_.Join();
    for (auto &each : callers_)
        each->thread.Join();
    callers_.clear();
    close(listener_);
    listener_ = -1;
}

void Server::Accept()
{
    for (;;) {
        int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED || errno == EMFILE))
            continue;
        if (fd < 0)
            return;
        std::lock_guard<std::mutex> held(lock_);
        if (stopping_) {
            close(fd);
            return;
        }
        Reap();
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        auto caller = std::make_unique<Caller>(Caller{this, fd, 0, Thread()});
        caller->thread.Start(
            [](void *argument) -> void * {
                auto *self = static_cast<Caller *>(argument);
                self->server->Serve(*self);
                return nullptr;
            },
            caller.get());
        callers_.push_back(std::move(caller));
    }
}

/* The greeting is the table as it is now: what is registered later is none of this link's business. */
void Server::Serve(Caller &caller)
{
    uint32_t magic = 0;
    caller.age = table_.Age();
    std::vector<Region> regions = table_.All();
    uint64_t count = regions.size();
    bool greeted = emu_receive(caller.fd, &magic, sizeof magic, EMU_NEVER) == 0 && magic == kMagic &&
                   emu_send(caller.fd, &count, sizeof count, EMU_NEVER) == 0 &&
                   emu_send(caller.fd, regions.data(), count * sizeof(Region), EMU_NEVER) == 0;
    RequestHead head;
    while (greeted && emu_receive(caller.fd, &head, sizeof head, EMU_NEVER) == 0)
        if (head.magic != kMagic || head.ops > kMaxOps || !Answer(caller, head))
            break;
    std::lock_guard<std::mutex> held(lock_);
    shutdown(caller.fd, SHUT_RDWR);
    close(caller.fd);
    caller.fd = -1;
}

/* With the lock held: forgets those who have left. */
void Server::Reap()
{
    for (auto each = callers_.begin(); each != callers_.end();) {
        if ((*each)->fd >= 0) {
            ++each;
            continue;
        }
        (*each)->thread.Join();
        each = callers_.erase(each);
    }
}

/* The payload of a WRITE that is refused is taken all the same: the next request is behind it. */
bool Server::Answer(Caller &caller, const RequestHead &head)
{
    std::vector<Region> ops(head.ops);
    if (emu_receive(caller.fd, ops.data(), ops.size() * sizeof(Region), EMU_NEVER) != 0)
        return false;
    AnswerHead answer = {head.id, SUCCESS, 0};
    int injected;
    bool fails = emu_fault("HixlServe", &injected);
    if (fails)
        answer.status = static_cast<Status>(injected);
    for (const Region &each : ops)
        if (!table_.Holds(each.start, each.length, caller.age) && answer.status == SUCCESS)
            answer.status = PARAM_INVALID;
    if (head.op == WRITE)
        for (const Region &each : ops)
            if (!Take(caller, answer.status == SUCCESS ? each.start : 0, each.length))
                return false;
    if (HasHungUp(caller.fd) || emu_send(caller.fd, &answer, sizeof answer, EMU_NEVER) != 0)
        return false;
    if (head.op == READ && answer.status == SUCCESS)
        for (const Region &each : ops)
            if (!Give(caller, each.start, each.length))
                return false;
    return true;
}

bool Server::Give(Caller &caller, uint64_t start, uint64_t length)
{
    std::vector<uint8_t> chunk(length < kChunk ? length : kChunk);
    for (uint64_t at = 0; at < length; at += kChunk) {
        size_t now = length - at < kChunk ? length - at : kChunk;
        if (!table_.Read(chunk.data(), start + at, now, caller.age) ||
            emu_send(caller.fd, chunk.data(), now, EMU_NEVER) != 0)
            return false;
    }
    return true;
}

/* To nowhere if `start` is 0. */
bool Server::Take(Caller &caller, uint64_t start, uint64_t length)
{
    std::vector<uint8_t> chunk(length < kChunk ? length : kChunk);
    for (uint64_t at = 0; at < length; at += kChunk) {
        size_t now = length - at < kChunk ? length - at : kChunk;
        if (emu_receive(caller.fd, chunk.data(), now, EMU_NEVER) != 0)
            return false;
        if (start != 0 && (HasHungUp(caller.fd) || !table_.Write(start + at, chunk.data(), now, caller.age)))
            return false;
    }
    return true;
}
}  // namespace hixl
