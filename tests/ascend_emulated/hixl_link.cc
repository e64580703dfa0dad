/* The asking end of a link; see hixl.h. */

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cerrno>

#include "hixl.h"

namespace hixl {
Link::~Link()
{
    lock_.lock(); /* whoever closed it came before, which a sanitizer does not see of the references to it */
    lock_.unlock();
    if (fd_ >= 0)
        close(fd_);
    if (opened_)
        pthread_cond_destroy(&changed_);
}

Status Link::Open(const Address &address, int64_t deadline)
{
    fd_ = address.Dial(deadline);
    uint64_t count = 0;
    if (fd_ < 0 || emu_send(fd_, &kMagic, sizeof kMagic, deadline) != 0 ||
        emu_receive(fd_, &count, sizeof count, deadline) != 0 || count > kMaxOps)
        return TIMEOUT;
    remote_.resize(count);
    if (emu_receive(fd_, remote_.data(), count * sizeof(Region), deadline) != 0)
        return TIMEOUT;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&changed_, &attributes);
    pthread_condattr_destroy(&attributes);
    opened_ = true;
    auto send = [](void *self) -> void * {
        static_cast<Link *>(self)->Send();
        return nullptr;
    };
    auto receive = [](void *self) -> void * {
        static_cast<Link *>(self)->Receive();
        return nullptr;
    };
    if (sender_.Start(send, this) && receiver_.Start(receive, this))
        return SUCCESS;
    Close(0);
    return FAILED;
}

/*
 * The hang-up makes the remote engine drop what it was sent. Until it does, or the deadline, late answers still arrive;
 * afterwards nothing is written any more, at either end.
 */
void Link::Close(int64_t deadline)
{
    Break();
    shutdown(fd_, SHUT_WR);
    char byte;
    while (emu_wait(fd_, POLLIN, deadline) == 0) {
        ssize_t left = recv(fd_, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
        if (left == 0 || (left < 0 && errno != EAGAIN && errno != EINTR))
            break;
        usleep(1000);
    }
    shutdown(fd_, SHUT_RDWR);
    sender_.Join();
    receiver_.Join();
    std::lock_guard<std::mutex> held(lock_);
}

/* Wakes all who wait; they find their requests unanswered on a broken link. */
void Link::Break()
{
    std::lock_guard<std::mutex> held(lock_);
    broken_ = true;
    pthread_cond_broadcast(&changed_);
}

bool Link::IsRemote(uint64_t start, uint64_t length) const
{
    for (const Region &each : remote_)
        if (start >= each.start && start - each.start < each.length && length <= each.length - (start - each.start))
            return true;
    return false;
}

Status Link::Check(const std::vector<TransferOpDesc> &ops)
{
    if (ops.empty() || ops.size() > kMaxOps)
        return PARAM_INVALID;
    for (const TransferOpDesc &each : ops)
        if (each.len == 0 || !table_.Holds(each.local_addr, each.len, age_) || !IsRemote(each.remote_addr, each.len))
            return PARAM_INVALID;
    return SUCCESS;
}

Status Link::Start(TransferOp op, const std::vector<TransferOpDesc> &ops, std::shared_ptr<Request> &request)
{
    Status status = op == READ || op == WRITE ? Check(ops) : PARAM_INVALID;
    if (status != SUCCESS)
        return status;
    std::lock_guard<std::mutex> held(lock_);
    if (broken_)
        return FAILED;
    request = std::make_shared<Request>();
    request->id = next_id_++;
    request->op = op;
    request->ops = ops;
    waiting_.push_back(request);
    unanswered_[request->id] = request;
    pthread_cond_broadcast(&changed_);
    return SUCCESS;
}

/* Whoever runs out of patience breaks the link for all. */
Status Link::Wait(const std::shared_ptr<Request> &request, int64_t deadline)
{
    timespec until = {static_cast<time_t>(deadline / 1000), static_cast<long>(deadline % 1000 * 1000000)};
    int waited = 0;
    std::lock_guard<std::mutex> held(lock_);
    while (!request->done && !broken_ && waited != ETIMEDOUT)
        waited = pthread_cond_timedwait(&changed_, lock_.native_handle(), &until);
    if (request->done)
        return request->status;
    Status status = broken_ ? FAILED : TIMEOUT;
    broken_ = true;
    pthread_cond_broadcast(&changed_);
    return status;
}

TransferStatus Link::Poll(const std::shared_ptr<Request> &request)
{
    std::lock_guard<std::mutex> held(lock_);
    if (!request->done)
        return broken_ ? TransferStatus::FAILED : TransferStatus::WAITING;
    return request->status == SUCCESS ? TransferStatus::COMPLETED : TransferStatus::FAILED;
}

/* What waits on a link that breaks is still sent: a board does not call its requests back either. */
void Link::Send()
{
    for (;;) {
        std::shared_ptr<Request> next;
        {
            std::lock_guard<std::mutex> held(lock_);
            while (waiting_.empty() && !broken_)
                pthread_cond_wait(&changed_, lock_.native_handle());
            if (waiting_.empty())
                return;
            next = waiting_.front();
            waiting_.pop_front();
        }
        if (!SendOne(*next)) {
            Break();
            return;
        }
    }
}

bool Link::SendOne(const Request &request)
{
    RequestHead head = {kMagic, static_cast<uint32_t>(request.op), request.id,
                        static_cast<uint32_t>(request.ops.size()), 0};
    std::vector<Region> ops;
    for (const TransferOpDesc &each : request.ops)
        ops.push_back({each.remote_addr, each.len});
    if (emu_send(fd_, &head, sizeof head, EMU_NEVER) != 0 ||
        emu_send(fd_, ops.data(), ops.size() * sizeof(Region), EMU_NEVER) != 0)
        return false;
    if (request.op == READ)
        return true;
    std::vector<uint8_t> chunk(kChunk);
    for (const TransferOpDesc &each : request.ops)
        for (size_t at = 0; at < each.len; at += kChunk) {
            size_t now = each.len - at < kChunk ? each.len - at : kChunk;
            if (!table_.Read(chunk.data(), each.local_addr + at, now, age_) ||
                emu_send(fd_, chunk.data(), now, EMU_NEVER) != 0)
                return false;
        }
    return true;
}

void Link::Receive()
{
    while (ReceiveOne())
        ;
    Break();
}

/* Memory that was deregistered meanwhile is not written; the rest of its answer is taken all the same. */
bool Link::ReceiveOne()
{
    AnswerHead head;
    if (emu_receive(fd_, &head, sizeof head, EMU_NEVER) != 0)
        return false;
    std::shared_ptr<Request> request;
    {
        std::lock_guard<std::mutex> held(lock_);
        auto found = unanswered_.find(head.id);
        if (found == unanswered_.end())
            return false;
        request = found->second;
    }
    Status status = head.status;
    std::vector<uint8_t> chunk(kChunk);
    if (request->op == READ && head.status == SUCCESS)
        for (const TransferOpDesc &each : request->ops)
            for (size_t at = 0; at < each.len; at += kChunk) {
                size_t now = each.len - at < kChunk ? each.len - at : kChunk;
                if (emu_receive(fd_, chunk.data(), now, EMU_NEVER) != 0)
                    return false;
                if (!table_.Write(each.local_addr + at, chunk.data(), now, age_))
                    status = FAILED;
            }
    std::lock_guard<std::mutex> held(lock_);
    request->done = true;
    request->status = status;
    unanswered_.erase(head.id);
    pthread_cond_broadcast(&changed_);
    return true;
}
}  // namespace hixl
