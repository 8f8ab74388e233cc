#include "capability.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dlkit {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

CpuCapability of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // clang's __builtin_cpu_supports did not always know F16C.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::Avx512Bf16;
  return avx512 ? CpuCapability::Avx512 : avx2 ? CpuCapability::Avx2 : CpuCapability::Baseline;
#else
  return CpuCapability::Baseline;
#endif
}

CpuCapability best() { return std::min(of_processor(), static_cast<CpuCapability>(DLKIT_CPU_SETS)); }

int index_of(const char* name) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

CpuCapability choose() {
  const char* wanted = std::getenv("DLKIT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best();
  const int index = index_of(wanted);
  if (index >= 0) return std::min(best(), static_cast<CpuCapability>(index));
  std::fprintf(stderr,
               "dlkit: DLKIT_CPU_CAPABILITY=%s is not one of default, avx2, avx512, avx512_bf16; it is ignored\n",
               wanted);
  return best();
}

std::atomic<CpuCapability>& chosen() {
  static std::atomic<CpuCapability> capability{choose()};
  return capability;
}

}  // namespace

CpuCapability cpu_capability() { return chosen().load(std::memory_order_relaxed); }

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

const char* processor_capability_name() { return kNames[static_cast<int>(of_processor())]; }

bool set_cpu_capability(const char* name) {
  const int index = index_of(name);
  if (index >= 0) chosen() = std::min(best(), static_cast<CpuCapability>(index));
  return index >= 0;
}

}  // namespace dlkit
