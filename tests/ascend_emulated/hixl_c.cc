/* The class for ctypes; built against the emulation's interface, of which no vendor has these functions. */

#include "hixl.h"

using namespace hixl;

extern "C" {
EMU_API void *emu_hixl_new()
{
    return new Hixl();
}

EMU_API void emu_hixl_delete(void *self)
{
    delete static_cast<Hixl *>(self);
}

EMU_API Status emu_hixl_initialize(void *self, const char *name)
{
    return static_cast<Hixl *>(self)->Initialize(name, {{"BufferPool", "4:8"}});
}

EMU_API void emu_hixl_finalize(void *self)
{
    static_cast<Hixl *>(self)->Finalize();
}

EMU_API Status emu_hixl_register(void *self, uintptr_t start, size_t length, int is_host, void **handle)
{
    MemDesc memory;
    memory.addr = start;
    memory.len = length;
    return static_cast<Hixl *>(self)->RegisterMem(memory, is_host != 0 ? MEM_HOST : MEM_DEVICE, *handle);
}

EMU_API Status emu_hixl_deregister(void *self, void *handle)
{
    return static_cast<Hixl *>(self)->DeregisterMem(handle);
}

EMU_API Status emu_hixl_connect(void *self, const char *remote, int32_t timeout_ms)
{
    return static_cast<Hixl *>(self)->Connect(remote, timeout_ms);
}

EMU_API Status emu_hixl_disconnect(void *self, const char *remote, int32_t timeout_ms)
{
    return static_cast<Hixl *>(self)->Disconnect(remote, timeout_ms);
}

/* `ops` holds three numbers for each of `count`: local address, remote address, length. */
EMU_API Status emu_hixl_transfer(void *self, const char *remote, int is_write, const uint64_t *ops, size_t count,
                                 int32_t timeout_ms)
{
    std::vector<TransferOpDesc> all;
    for (size_t i = 0; i < count; i++)
        all.push_back({ops[3 * i], ops[3 * i + 1], ops[3 * i + 2]});
    return static_cast<Hixl *>(self)->TransferSync(remote, is_write != 0 ? WRITE : READ, all, timeout_ms);
}

EMU_API Status emu_hixl_start(void *self, const char *remote, int is_write, const uint64_t *op, void **request)
{
    TransferArgs none;
    return static_cast<Hixl *>(self)->TransferAsync(remote, is_write != 0 ? WRITE : READ, {{op[0], op[1], op[2]}}, none,
                                                    *request);
}

EMU_API Status emu_hixl_status(void *self, void *request, int *status)
{
    TransferStatus now = TransferStatus::WAITING;
    Status result = static_cast<Hixl *>(self)->GetTransferStatus(request, now);
    *status = static_cast<int>(now);
    return result;
}
}
