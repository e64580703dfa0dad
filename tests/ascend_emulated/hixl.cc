/* libcann_hixl.so: the engine, its rules of order and its registered memory. */

#include "hixl.h"

#include <sys/types.h>
#include <unistd.h>
#include <cstring>

namespace hixl {
namespace {
constexpr size_t kMaxRegistrations = 256;
constexpr uint64_t kMaxDeviceBytes = 50ULL << 30;

/* True if the call is to return `status`: by an injected fault, or as its thread has no context. */
bool IsRefused(const char *name, Status &status)
{
    int injected;
    status = FAILED;
    if (!emu_fault(name, &injected))
        return emu_current_device() < 0;
    status = static_cast<Status>(injected);
    return true;
}

void *Pointer(uint64_t address)
{
    return reinterpret_cast<void *>(static_cast<uintptr_t>(address));
}
}  // namespace

Status Table::Add(const MemDesc &mem, MemType type, MemHandle &handle)
{
    if (mem.addr == 0 || mem.len == 0 || mem.addr + mem.len < mem.addr || (type != MEM_DEVICE && type != MEM_HOST))
        return PARAM_INVALID;
    emu_kind kind = emu_kind_of(Pointer(mem.addr), mem.len);
    if (kind == EMU_OUTSIDE || (kind == EMU_DEVICE) != (type == MEM_DEVICE))
        return PARAM_INVALID;
    std::lock_guard<std::mutex> held(lock_);
    uint64_t device_bytes = type == MEM_DEVICE ? mem.len : 0;
    for (const auto &each : entries_) {
        if (mem.addr < each.first + each.second.length && each.first < mem.addr + mem.len)
            return PARAM_INVALID;
        if (each.second.kind == EMU_DEVICE)
            device_bytes += each.second.length;
    }
    if (entries_.size() >= kMaxRegistrations || device_bytes > kMaxDeviceBytes)
        return RESOURCE_EXHAUSTED;
    entries_[mem.addr] = {mem.len, ++age_, type == MEM_DEVICE ? EMU_DEVICE : EMU_PAGEABLE};
    handle = Pointer(mem.addr);
    return SUCCESS;
}

Status Table::Remove(MemHandle handle)
{
    std::lock_guard<std::mutex> held(lock_);
    return entries_.erase(reinterpret_cast<uintptr_t>(handle)) == 1 ? SUCCESS : PARAM_INVALID;
}

void Table::Clear()
{
    std::lock_guard<std::mutex> held(lock_);
    entries_.clear();
}

uint64_t Table::Age()
{
    std::lock_guard<std::mutex> held(lock_);
    return age_;
}

std::vector<Region> Table::All()
{
    std::lock_guard<std::mutex> held(lock_);
    std::vector<Region> all;
    for (const auto &each : entries_)
        all.push_back({each.first, each.second.length});
    return all;
}

/* One registration must hold the whole range. */
const Table::Entry *Table::Find(uint64_t start, uint64_t length, uint64_t age) const
{
    auto behind = entries_.upper_bound(start);
    if (behind == entries_.begin())
        return nullptr;
    const auto &found = *--behind;
    uint64_t offset = start - found.first;
    bool holds = found.second.age <= age && offset < found.second.length && length <= found.second.length - offset;
    return holds ? &found.second : nullptr;
}

bool Table::Holds(uint64_t start, uint64_t length, uint64_t age)
{
    std::lock_guard<std::mutex> held(lock_);
    return Find(start, length, age) != nullptr;
}

bool Table::Read(void *into, uint64_t from, size_t length, uint64_t age)
{
    std::lock_guard<std::mutex> held(lock_);
    const Entry *found = Find(from, length, age);
    return found != nullptr && emu_copy({into, EMU_PAGEABLE}, {Pointer(from), found->kind}, length);
}

bool Table::Write(uint64_t to, const void *from, size_t length, uint64_t age)
{
    std::lock_guard<std::mutex> held(lock_);
    const Entry *found = Find(to, length, age);
    return found != nullptr && emu_copy({Pointer(to), found->kind}, {const_cast<void *>(from), EMU_PAGEABLE}, length);
}

class Hixl::HixlImpl {
public:
    HixlImpl() : server_(table_) {}
    Status Initialize(const char *name);
    void Finalize();
    bool IsReady();
    Status Connect(const std::string &remote, int32_t timeout_ms);
    Status Disconnect(const std::string &remote, int32_t timeout_ms);
    Status Start(const std::string &remote, TransferOp op, const std::vector<TransferOpDesc> &ops,
                 std::shared_ptr<Link> &link, std::shared_ptr<Request> &request);
    Status Ask(const TransferReq &request, TransferStatus &status);

    struct Asynchronous {
        std::shared_ptr<Link> link;
        std::shared_ptr<Request> request;
    };
    Table table_;
    TransferReq Keep(const Asynchronous &what);
    bool IsOfThisProcess() const { return owner_ == getpid(); }

private:
    const pid_t owner_ = getpid();
    Server server_;
    std::mutex lock_;
    bool ready_ = false;
    uintptr_t next_ = 1;
    std::map<std::string, std::shared_ptr<Link>> links_; /* empty while it is being made */
    std::map<uintptr_t, Asynchronous> asynchronous_;
};

Status Hixl::HixlImpl::Initialize(const char *name)
{
    Address address;
    std::lock_guard<std::mutex> held(lock_);
    if (ready_)
        return FAILED;
    if (!Address::Parse(name, address) || (address.port != 0 && !server_.Start(address)))
        return PARAM_INVALID;
    ready_ = true;
    return SUCCESS;
}

void Hixl::HixlImpl::Finalize()
{
    std::map<std::string, std::shared_ptr<Link>> links;
    {
        std::lock_guard<std::mutex> held(lock_);
        if (!ready_)
            return;
        ready_ = false;
        links.swap(links_);
        asynchronous_.clear();
    }
    for (auto &each : links)
        if (each.second)
            each.second->Close(0);
    server_.Stop();
    table_.Clear();
}

bool Hixl::HixlImpl::IsReady()
{
    std::lock_guard<std::mutex> held(lock_);
    return ready_;
}

Status Hixl::HixlImpl::Connect(const std::string &remote, int32_t timeout_ms)
{
    Address address;
    if (timeout_ms <= 0 || !Address::Parse(remote.c_str(), address) || address.port == 0)
        return PARAM_INVALID;
    {
        std::lock_guard<std::mutex> held(lock_);
        if (!links_.emplace(remote, nullptr).second)
            return ALREADY_CONNECTED;
    }
    auto link = std::make_shared<Link>(table_, table_.Age());
    Status status = link->Open(address, emu_deadline(timeout_ms));
    std::lock_guard<std::mutex> held(lock_);
    auto place = links_.find(remote);
    if (status == SUCCESS && place == links_.end()) { /* finalised meanwhile */
        link->Close(0);
        return FAILED;
    }
    if (status == SUCCESS)
        place->second = link;
    else if (place != links_.end())
        links_.erase(place);
    return status;
}

Status Hixl::HixlImpl::Disconnect(const std::string &remote, int32_t timeout_ms)
{
    std::shared_ptr<Link> link;
    if (timeout_ms <= 0)
        return PARAM_INVALID;
    {
        std::lock_guard<std::mutex> held(lock_);
        auto found = links_.find(remote);
        if (found == links_.end() || !found->second)
            return NOT_CONNECTED;
        link = found->second;
        links_.erase(found);
    }
    link->Close(emu_deadline(timeout_ms));
    return SUCCESS;
}

Status Hixl::HixlImpl::Start(const std::string &remote, TransferOp op, const std::vector<TransferOpDesc> &ops,
                             std::shared_ptr<Link> &link, std::shared_ptr<Request> &request)
{
    {
        std::lock_guard<std::mutex> held(lock_);
        auto found = links_.find(remote);
        if (found == links_.end() || !found->second)
            return NOT_CONNECTED;
        link = found->second;
    }
    return link->Start(op, ops, request);
}

TransferReq Hixl::HixlImpl::Keep(const Asynchronous &what)
{
    std::lock_guard<std::mutex> held(lock_);
    asynchronous_[next_] = what;
    return Pointer(next_++);
}

/* A request that has ended is forgotten with the answer that says so. */
Status Hixl::HixlImpl::Ask(const TransferReq &request, TransferStatus &status)
{
    std::lock_guard<std::mutex> held(lock_);
    auto found = asynchronous_.find(reinterpret_cast<uintptr_t>(request));
    if (found == asynchronous_.end())
        return PARAM_INVALID;
    status = found->second.link->Poll(found->second.request);
    if (status != TransferStatus::WAITING)
        asynchronous_.erase(found);
    return SUCCESS;
}

Hixl::Hixl() : impl_(new HixlImpl()) {}

/* A forked child has the object without its threads, which it could wait for in vain. */
Hixl::~Hixl()
{
    if (impl_->IsOfThisProcess())
        impl_->Finalize();
    else
        static_cast<void>(impl_.release());
}

Status Hixl::Initialize(const ge::AscendString &local_engine,
                        const std::map<ge::AscendString, ge::AscendString> &options)
{
    Status status;
    static_cast<void>(options);
    return IsRefused("HixlInitialize", status) ? status : impl_->Initialize(local_engine.GetString());
}

void Hixl::Finalize()
{
    int ignored;
    emu_fault("HixlFinalize", &ignored);
    if (impl_->IsOfThisProcess())
        impl_->Finalize();
}

Status Hixl::RegisterMem(const MemDesc &mem, MemType type, MemHandle &handle)
{
    Status status;
    if (IsRefused("HixlRegisterMem", status))
        return status;
    return impl_->IsReady() ? impl_->table_.Add(mem, type, handle) : FAILED;
}

Status Hixl::DeregisterMem(MemHandle handle)
{
    Status status;
    if (IsRefused("HixlDeregisterMem", status))
        return status;
    return impl_->IsReady() ? impl_->table_.Remove(handle) : FAILED;
}

Status Hixl::Connect(const ge::AscendString &remote, int32_t timeout_ms)
{
    Status status;
    if (IsRefused("HixlConnect", status))
        return status;
    return impl_->IsReady() ? impl_->Connect(remote.GetString(), timeout_ms) : FAILED;
}

Status Hixl::Disconnect(const ge::AscendString &remote, int32_t timeout_ms)
{
    Status status;
    if (IsRefused("HixlDisconnect", status))
        return status;
    return impl_->IsReady() ? impl_->Disconnect(remote.GetString(), timeout_ms) : FAILED;
}

Status Hixl::TransferSync(const ge::AscendString &remote, TransferOp op, const std::vector<TransferOpDesc> &ops,
                          int32_t timeout_ms)
{
    Status status;
    std::shared_ptr<Link> link;
    std::shared_ptr<Request> request;
    if (IsRefused("HixlTransferSync", status))
        return status;
    if (!impl_->IsReady())
        return FAILED;
    int64_t deadline = emu_deadline(timeout_ms);
    status = timeout_ms > 0 ? impl_->Start(remote.GetString(), op, ops, link, request) : PARAM_INVALID;
    return status == SUCCESS ? link->Wait(request, deadline) : status;
}

Status Hixl::TransferAsync(const ge::AscendString &remote, TransferOp op, const std::vector<TransferOpDesc> &ops,
                           const TransferArgs &args, TransferReq &request)
{
    Status status;
    HixlImpl::Asynchronous made;
    static_cast<void>(args);
    if (IsRefused("HixlTransferAsync", status))
        return status;
    if (!impl_->IsReady())
        return FAILED;
    status = impl_->Start(remote.GetString(), op, ops, made.link, made.request);
    if (status == SUCCESS)
        request = impl_->Keep(made);
    return status;
}

Status Hixl::GetTransferStatus(const TransferReq &request, TransferStatus &status)
{
    Status refused;
    if (IsRefused("HixlGetTransferStatus", refused))
        return refused;
    return impl_->IsReady() ? impl_->Ask(request, status) : FAILED;
}
}  // namespace hixl
