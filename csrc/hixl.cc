// The boundary to HIXL, a C++ library; see hixl.h. Its classes are declared here as far as we use them, from the public
// documentation; no function of theirs is linked against, all are called through the table that bind() was given. An
// ordinary (non-virtual) member function takes its object as the first argument.

#include "hixl.h"

#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace {
hixl_symbols found;
}

namespace ge {
class AscendString {
 public:
  explicit AscendString(const char *name);
  bool operator<(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> name_;
};
static_assert(sizeof(AscendString) == 16, "as CANN has it");

AscendString::AscendString(const char *name) {
  reinterpret_cast<void (*)(AscendString *, const char *)>(found.string)(this, name);
}

bool AscendString::operator<(const AscendString &other) const {
  return reinterpret_cast<bool (*)(const AscendString *, const AscendString &)>(found.string_less)(this, other);
}
}  // namespace ge

namespace {

using ge::AscendString;
using Options = std::map<AscendString, AscendString>;

struct MemDesc {
  uintptr_t addr;
  size_t len;
  uint8_t reserved[128];
};
static_assert(sizeof(MemDesc) == 144, "as HIXL has it");

struct TransferOpDesc {
  uintptr_t local_addr, remote_addr;
  size_t len;
};
static_assert(sizeof(TransferOpDesc) == sizeof(hixl_op), "as HIXL has it");

enum MemType : int { MEM_DEVICE, MEM_HOST };
enum TransferOp : int { READ, WRITE };

// hixl::Hixl: one pointer to what it hides.
struct Engine {
  void *hidden;
};

template <typename Function>
Function as(void *symbol) {
  return reinterpret_cast<Function>(symbol);
}

// Whatever a call throws ends here.
template <typename Call>
uint32_t guarded(Call call) {
  try {
    return call();
  } catch (...) {
    return HIXL_THREW;
  }
}

void bind(const hixl_symbols *symbols) { found = *symbols; }

void *make() {
  auto *engine = new (std::nothrow) Engine{nullptr};
  if (engine && guarded([&] { return as<void (*)(Engine *)>(found.make)(engine), HIXL_SUCCESS; }) != HIXL_SUCCESS) {
    delete engine;
    return nullptr;
  }
  return engine;
}

void unmake(void *engine) {
  guarded([&] { return as<void (*)(Engine *)>(found.unmake)(static_cast<Engine *>(engine)), HIXL_SUCCESS; });
  delete static_cast<Engine *>(engine);
}

uint32_t initialize(void *engine, const char *name, const char *buffer_pool) {
  return guarded([&] {
    Options options;
    if (*buffer_pool) options.emplace(AscendString("BufferPool"), AscendString(buffer_pool));
    return as<uint32_t (*)(void *, const AscendString &, const Options &)>(found.initialize)(engine, AscendString(name),
                                                                                           options);
  });
}

void finalize(void *engine) {
  guarded([&] { return as<void (*)(void *)>(found.finalize)(engine), HIXL_SUCCESS; });
}

uint32_t enlist(void *engine, uint64_t address, uint64_t bytes, int on_host, void **handle) {
  return guarded([&] {
    MemDesc memory{address, bytes, {}};
    return as<uint32_t (*)(void *, const MemDesc &, MemType, void *&)>(found.register_memory)(
        engine, memory, on_host ? MEM_HOST : MEM_DEVICE, *handle);
  });
}

uint32_t delist(void *engine, void *handle) {
  return guarded([&] { return as<uint32_t (*)(void *, void *)>(found.deregister_memory)(engine, handle); });
}

uint32_t link(void *engine, const char *remote, int milliseconds) {
  return guarded([&] {
    return as<uint32_t (*)(void *, const AscendString &, int32_t)>(found.connect)(engine, AscendString(remote),
                                                                                 milliseconds);
  });
}

uint32_t unlink(void *engine, const char *remote, int milliseconds) {
  return guarded([&] {
    return as<uint32_t (*)(void *, const AscendString &, int32_t)>(found.disconnect)(engine, AscendString(remote),
                                                                                    milliseconds);
  });
}

uint32_t read(void *engine, const char *remote, const hixl_op *ops, size_t count, int milliseconds) {
  return guarded([&] {
    const auto *first = reinterpret_cast<const TransferOpDesc *>(ops);
    const std::vector<TransferOpDesc> list(first, first + count);
    return as<uint32_t (*)(void *, const AscendString &, TransferOp, const std::vector<TransferOpDesc> &, int32_t)>(
        found.transfer)(engine, AscendString(remote), READ, list, milliseconds);
  });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const hixl_calls pd_hixl_calls;
const hixl_calls pd_hixl_calls = {bind,   make,   unmake, initialize, finalize, enlist,
                                  delist, link,   unlink, read};
