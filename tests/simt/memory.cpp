// The memory of tensors while the CUDA path runs on the CPU: poisoned when it is fresh, and with a redzone on either
// side that is looked at when it is freed. Every byte of the poison is 0xff: NaN in every floating type, -1 as a
// number.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kRedzone = 256;  // bytes, a multiple of the alignment that torch promises
constexpr unsigned char kPoison = 0xff, kGuard = 0xa7;

// In front of the lower redzone.
struct alignas(kRedzone) Header {
  size_t bytes;
};

unsigned char* base_of(void* data) { return static_cast<unsigned char*>(data) - kRedzone - sizeof(Header); }

void look_at(const unsigned char* zone, const char* where, size_t bytes) {
  for (size_t i = 0; i < kRedzone; ++i) {
    if (zone[i] == kGuard) continue;
    fprintf(stderr, "somebody wrote %s an allocation of %zu bytes, at byte %zu of the redzone\n", where, bytes, i);
    abort();
  }
}

void release(void* data) {
  if (data == nullptr) return;
  unsigned char* const base = base_of(data);
  const size_t bytes = reinterpret_cast<const Header*>(base)->bytes;
  look_at(base + sizeof(Header), "in front of", bytes);
  look_at(static_cast<unsigned char*>(data) + bytes, "behind", bytes);
  free(base);
}

struct Guarded final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    const size_t total = sizeof(Header) + 2 * kRedzone + (bytes + kRedzone - 1) / kRedzone * kRedzone;
    auto* const base = static_cast<unsigned char*>(aligned_alloc(kRedzone, total));
    TORCH_CHECK(base, "no memory for ", bytes, " bytes");
    reinterpret_cast<Header*>(base)->bytes = bytes;
    unsigned char* const data = base + sizeof(Header) + kRedzone;
    memset(data - kRedzone, kGuard, kRedzone);
    memset(data, kPoison, bytes);
    memset(data + bytes, kGuard, kRedzone);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// From now on, for all tensors of the process.
extern "C" void triplet_ext_guard_memory() {
  static Guarded* const allocator = new Guarded;  // outlives every tensor
  c10::SetCPUAllocator(allocator, /*priority=*/1);
}
