#include "capability.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dlkit {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512"};

CpuCapability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? CpuCapability::Avx512 : avx2 ? CpuCapability::Avx2 : CpuCapability::Baseline;
#else
  return CpuCapability::Baseline;
#endif
}

CpuCapability choose() {
  const CpuCapability best = detect();
  const char* wanted = std::getenv("DLKIT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return std::min(best, static_cast<CpuCapability>(i));
  }
  std::fprintf(stderr, "dlkit: DLKIT_CPU_CAPABILITY=%s is not one of default, avx2, avx512; using %s\n", wanted,
               kNames[static_cast<int>(best)]);
  return best;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability chosen = choose();
  return chosen;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace dlkit
