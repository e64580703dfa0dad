// A torch device "npu" whose memory is ordinary host memory: PrivateUse1 with an allocator, the few operators that make
// and copy tensors, and the CPU for everything else. It stands in for torch-npu where there is no NPU: addresses,
// strides, storages and views are real, streams and kernels are not.
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/library.h>

namespace {

constexpr size_t kPage = size_t{2} << 20;  // what NPUs map their memory by
constexpr auto kKey = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

// An emulated libascendcl.so that a test has loaded is told what is device memory; it may as well not be there.
template <typename Function>
Function hook(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) {
    if (void* library = dlopen("libascendcl.so", RTLD_NOLOAD | RTLD_LAZY)) {
      found = dlsym(library, name);
      dlclose(library);
    }
  }
  return reinterpret_cast<Function>(found);
}

struct Block {
  void* address;
  size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  if (auto disown = hook<int (*)(void*)>("emu_disown")) disown(block->address);
  munmap(block->address, block->bytes);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t wanted) override {
    const c10::Device device(c10::DeviceType::PrivateUse1, 0);
    if (wanted == 0) return {nullptr, device};
    const size_t bytes = (wanted + kPage - 1) / kPage * kPage;
    char* raw = static_cast<char*>(
        mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    TORCH_CHECK(raw != MAP_FAILED, "no memory for ", bytes, " bytes of an emulated NPU");
    const size_t before = (kPage - reinterpret_cast<uintptr_t>(raw) % kPage) % kPage;
    if (before != 0) munmap(raw, before);
    if (before != kPage) munmap(raw + before + bytes, kPage - before);
    auto* block = new Block{raw + before, bytes};
    if (auto adopt = hook<int (*)(void*, size_t)>("emu_adopt")) {
      const int refusal = adopt(block->address, bytes);
      TORCH_CHECK(refusal == 0, "the emulated libascendcl.so refused ", bytes, " bytes: ", refusal);
    }
    return {block->address, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);
C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1>);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKey, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKey, c10::dtype_or_default(type));
}

// The same bytes as a CPU tensor.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(c10::DeviceType::CPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (to.numel() != 0) on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  return at::cpu::set_(self, storage, offset, size, stride);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::as_strided(self, size, stride);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("as_strided", static_cast<at::Tensor (*)(const at::Tensor&, c10::IntArrayRef, c10::IntArrayRef,
                                                        std::optional<int64_t>)>(&at::cpu::as_strided));
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("resize_", &at::native::resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
