/*
 * The engine's interface as documented, declared by ourselves, and what its emulation consists of: an engine (hixl.cc)
 * with a table of registered memory, a server that answers remote engines (hixl_server.cc), links (hixl_link.cc).
 */
#ifndef PD_ASCEND_HIXL_H
#define PD_ASCEND_HIXL_H

#include <pthread.h>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emu.h"

namespace ge {
class EMU_API AscendString {
public:
    AscendString() = default;
    ~AscendString() = default;
    AscendString(const char *name);
    bool operator<(const AscendString &other) const;
    const char *GetString() const;

private:
    std::shared_ptr<std::string> name_;
};
}  // namespace ge

namespace hixl {
using Status = uint32_t;
using MemHandle = void *;
using TransferReq = void *;

enum MemType { MEM_DEVICE, MEM_HOST };
enum TransferOp { READ, WRITE };
enum class TransferStatus { WAITING, COMPLETED, TIMEOUT, FAILED };

constexpr Status SUCCESS = 0, PARAM_INVALID = 103900, TIMEOUT = 103901, NOT_CONNECTED = 103902;
constexpr Status ALREADY_CONNECTED = 103903, RESOURCE_EXHAUSTED = 203900, FAILED = 503900;

struct MemDesc {
    uintptr_t addr;
    size_t len;
    uint8_t reserved[128] = {};
};

struct TransferOpDesc {
    uintptr_t local_addr, remote_addr;
    size_t len;
};

struct TransferArgs {
    uint8_t reserved[128] = {};
};

class EMU_API Hixl {
public:
    Hixl();
    ~Hixl();
    Status Initialize(const ge::AscendString &local_engine,
                      const std::map<ge::AscendString, ge::AscendString> &options);
    void Finalize();
    Status RegisterMem(const MemDesc &mem, MemType type, MemHandle &handle);
    Status DeregisterMem(MemHandle handle);
    Status Connect(const ge::AscendString &remote, int32_t timeout_ms);
    Status Disconnect(const ge::AscendString &remote, int32_t timeout_ms);
    Status TransferSync(const ge::AscendString &remote, TransferOp op, const std::vector<TransferOpDesc> &ops,
                        int32_t timeout_ms);
    Status TransferAsync(const ge::AscendString &remote, TransferOp op, const std::vector<TransferOpDesc> &ops,
                         const TransferArgs &args, TransferReq &request);
    Status GetTransferStatus(const TransferReq &request, TransferStatus &status);

private:
    class HixlImpl;
    std::unique_ptr<HixlImpl> impl_;
};

/* From here on it is our own business, which no user of the library sees. */

constexpr uint32_t kMagic = 0x4C584948;
constexpr size_t kChunk = 256 << 10;
constexpr uint32_t kMaxOps = 1 << 20;

struct Region {
    uint64_t start, length;
};

struct RequestHead {
    uint32_t magic, op;
    uint64_t id;
    uint32_t ops, unused;
};

struct AnswerHead {
    uint64_t id;
    uint32_t status, unused;
};

/* Registered memory. A link sees what was registered before it was made: `age` numbers the registrations. */
class Table {
public:
    Status Add(const MemDesc &mem, MemType type, MemHandle &handle);
    Status Remove(MemHandle handle);
    void Clear();
    uint64_t Age();
    std::vector<Region> All();
    bool Holds(uint64_t start, uint64_t length, uint64_t age);
    /* Under the table's lock, so that nothing is copied from or to memory that was deregistered. */
    bool Read(void *into, uint64_t from, size_t length, uint64_t age);
    bool Write(uint64_t to, const void *from, size_t length, uint64_t age);

private:
    struct Entry {
        uint64_t length, age;
        emu_kind kind;
    };
    const Entry *Find(uint64_t start, uint64_t length, uint64_t age) const;

    std::mutex lock_;
    std::map<uint64_t, Entry> entries_;
    uint64_t age_ = 0;
};

/* "ip:port" or "[v6]:port"; port 0: there is none, which is a client's name. */
struct Address {
    std::string host;
    uint16_t port = 0;
    bool is_v6 = false;
    static bool Parse(const char *text, Address &into);
    /* A socket that listens there (or is on its way there until the deadline), -1 with errno. */
    int Listen() const;
    int Dial(int64_t deadline) const;
};

/* Joins on request and never at its destruction, so that a forked child may drop it. */
class Thread {
public:
    bool Start(void *(*run)(void *), void *argument);
    void Join();

private:
    pthread_t thread_ = {};
    bool running_ = false;
};

class Server {
public:
    explicit Server(Table &table) : table_(table) {}
    bool Start(const Address &address);
    void Stop();

private:
    struct Caller {
        Server *server;
        int fd; /* -1 from its end on, which the server's lock guards */
        uint64_t age;
        Thread thread;
    };
    void Accept();
    void Serve(Caller &caller);
    void Reap();
    bool Answer(Caller &caller, const RequestHead &head);
    bool Give(Caller &caller, uint64_t start, uint64_t length);
    bool Take(Caller &caller, uint64_t start, uint64_t length);

    Table &table_;
    int listener_ = -1;
    Thread thread_;
    std::mutex lock_;
    bool stopping_ = false;
    std::vector<std::unique_ptr<Caller>> callers_;
};

struct Request {
    uint64_t id;
    TransferOp op;
    std::vector<TransferOpDesc> ops;
    bool done = false;
    Status status = SUCCESS;
};

/*
 * One connection to a remote engine: a thread sends requests in order, another one takes the answers. After a failure
 * the link takes no more requests, yet late answers are still written to where they were asked for, until Close.
 */
class Link {
public:
    Link(Table &table, uint64_t age) : table_(table), age_(age) {}
    ~Link();
    Status Open(const Address &address, int64_t deadline);
    void Close(int64_t deadline);
    Status Start(TransferOp op, const std::vector<TransferOpDesc> &ops, std::shared_ptr<Request> &request);
    Status Wait(const std::shared_ptr<Request> &request, int64_t deadline);
    TransferStatus Poll(const std::shared_ptr<Request> &request);

private:
    Status Check(const std::vector<TransferOpDesc> &ops);
    bool IsRemote(uint64_t start, uint64_t length) const;
    void Send();
    bool SendOne(const Request &request);
    void Receive();
    bool ReceiveOne();
    void Break();

    Table &table_;
    const uint64_t age_;
    int fd_ = -1;
    std::vector<Region> remote_;
    Thread sender_, receiver_;
    std::mutex lock_;
    pthread_cond_t changed_;
    bool opened_ = false, broken_ = false;
    uint64_t next_id_ = 1;
    std::deque<std::shared_ptr<Request>> waiting_;            /* to be sent */
    std::map<uint64_t, std::shared_ptr<Request>> unanswered_; /* sent or to be sent */
};
}  // namespace hixl
#endif
