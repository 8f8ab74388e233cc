// CPU memory that the next tensor reuses. glibc takes blocks above 32 MB from the kernel at every malloc and gives them
// back at every free: a fresh output of 32 MB costs 8,193 page faults, which take longer than its LayerNorm. If mallopt
// tells glibc to keep such blocks in its heap, it loses them there: torch asks for aligned blocks, the scraps cut off
// for the alignment go to small objects, and the freed block is a few bytes too short for the next one of its size. A
// loop that keeps one small tensor a step (a list of losses) then grew by a whole block a step, 3 GB in 48 steps.
// Blocks of 128 KB and more (the sizes that glibc maps at first) therefore have their own allocator here: they are
// mapped once, kept when freed, and given to the next tensor of at least half the size. They use huge pages where the
// system gives them on request.
#if !defined(DLKIT_CUDA_ON_CPU)
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace dlkit::memory {
namespace {

constexpr size_t kLeast = 128 << 10;
constexpr size_t kLine = 64, kPage = 4096, kLargestPage = 64 << 10, kHugePage = 2 << 20;
constexpr int64_t kOff = -1;

void deallocate(void* data);

class Reusing final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    if (n < kLeast) return under_->allocate(n);
    n = (n + kPage - 1) / kPage * kPage;
    void* data = take(n);
    if (data == nullptr) {
      data = map(n);
      if (data == nullptr) {
        give_back(0);
        data = map(n);
      }
      TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "reuse_cpu_memory: cannot allocate ", n, " bytes");
      const std::lock_guard lock(mutex_);
      used_.emplace(data, n);
    }
    c10::profiledCPUMemoryReporter().New(data, n);
    return {data, data, &deallocate, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &deallocate; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

  void free(void* data) {
    if (!keep(data)) return under_->raw_deallocate(data);  // a small one, from raw_allocate
    give_back(std::max<int64_t>(limit_, 0));
  }

  // From now on at most `limit` bytes are kept; with kOff the previous allocator serves new tensors.
  int64_t set_limit(int64_t limit) {
    const int64_t before = limit_.exchange(limit);
    if (before == kOff && limit != kOff) {
      under_ = c10::GetCPUAllocator();
      // glibc adapts to the first large block freed: from then on blocks below 32 MB come from its heap, which shrinks
      // only where 64 MB are free at its end. It no longer sees large tensors, and this block stands in for one.
      void* volatile block = std::malloc((32 << 20) - kPage);
      std::free(block);
      c10::SetCPUAllocator(this);
    } else if (before != kOff && limit == kOff) {
      c10::SetCPUAllocator(under_);
    }
    give_back(std::max<int64_t>(limit, 0));
    return before;
  }

  int64_t kept_bytes() {
    const std::lock_guard lock(mutex_);
    return kept_bytes_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  using Key = std::pair<size_t, uint64_t>;  // size, and a count that falls: the block freed last comes first

  // The address space that a block of n bytes takes, with room for where it begins, rounded up to any system's pages.
  static size_t mapped(size_t n) { return (n + kPage + kLargestPage - 1) / kLargestPage * kLargestPage; }

  // Blocks begin at different places in a page: if all tensors began at the same place, their rows would compete for
  // the same cache sets (LayerNorm's backward of 256 x 1024 then takes 110 us instead of 75). Large blocks are aligned
  // to huge pages.
  void* map(size_t n) {
    const size_t align = n < kHugePage ? 0 : kHugePage, length = mapped(n);
    void* data = mmap(nullptr, length + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(data);
    if (align != 0) {
      const size_t before = (align - reinterpret_cast<uintptr_t>(begin) % align) % align;
      if (before != 0) munmap(begin, before);
      begin += before;
      if (before != align) munmap(begin + length, align - before);
    }
#if defined(MADV_HUGEPAGE)
    madvise(begin, length, MADV_HUGEPAGE);
#endif
    return begin + maps_++ * 27 % 64 * kLine;
  }

  static void unmap(void* data, size_t n) {
    munmap(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) / kPage * kPage), mapped(n));
  }

  // Takes the smallest kept block of n to 2n bytes; among equals the one freed last, which the caches may still hold.
  void* take(size_t n) {
    const std::lock_guard lock(mutex_);
    const auto found = kept_.lower_bound({n, 0});
    if (found == kept_.end() || found->first.first > 2 * n) return nullptr;
    void* data = found->second;
    kept_bytes_ -= static_cast<int64_t>(found->first.first);
    used_.emplace(data, found->first.first);
    kept_.erase(found);
    return data;
  }

  bool keep(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    if (found == used_.end()) return false;
    c10::profiledCPUMemoryReporter().Delete(data);  // before another thread can get the block
    kept_.emplace(Key{found->second, --count_}, data);
    kept_bytes_ += static_cast<int64_t>(found->second);
    used_.erase(found);
    return true;
  }

  // Unmaps the blocks kept longest until `limit` bytes are left.
  void give_back(int64_t limit) {
    const std::lock_guard lock(mutex_);
    while (kept_bytes_ > limit) {
      const auto oldest = std::max_element(
          kept_.begin(), kept_.end(), [](const auto& a, const auto& b) { return a.first.second < b.first.second; });
      unmap(oldest->second, oldest->first.first);
      kept_bytes_ -= static_cast<int64_t>(oldest->first.first);
      kept_.erase(oldest);
    }
  }

  std::mutex mutex_;
  c10::Allocator* under_ = nullptr;
  std::atomic<int64_t> limit_{kOff};
  std::atomic<size_t> maps_{0};
  std::unordered_map<void*, size_t> used_;
  std::map<Key, void*> kept_;
  int64_t kept_bytes_ = 0;
  uint64_t count_ = UINT64_MAX;
};

// Never destroyed: tensors may outlive every static object.
Reusing& reusing() {
  static Reusing* const instance = [] {
    auto* made = new Reusing;
    // A forked worker must not inherit a lock that a thread it does not have was holding.
    pthread_atfork([] { reusing().mutex().lock(); }, [] { reusing().mutex().unlock(); },
                   [] { reusing().mutex().unlock(); });
    return made;
  }();
  return *instance;
}

void deallocate(void* data) { reusing().free(data); }

int64_t set_limit(int64_t limit) { return reusing().set_limit(limit); }
int64_t kept_bytes() { return reusing().kept_bytes(); }

}  // namespace
}  // namespace dlkit::memory

TORCH_LIBRARY_FRAGMENT(dlkit, m) {
  m.def("set_cpu_memory_limit(int limit) -> int", dlkit::memory::set_limit);
  m.def("kept_cpu_memory() -> int", dlkit::memory::kept_bytes);
}
#endif
