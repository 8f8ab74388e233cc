// Run-time dispatch over instruction sets. Every cpu.cpp is compiled once per instruction set (see CPU_CAPABILITIES in
// setup.py) with DLKIT_ISA naming the namespace; DLKIT_CPU_ENTRY defines the public entry, only in the baseline object.
// DLKIT_CPU_SETS is how many sets beyond the baseline were compiled, 0 to 3, in the order of CpuCapability.
#pragma once

#include "../scalar.h"

#if !defined(DLKIT_CPU_SETS)
#define DLKIT_CPU_SETS 0
#endif

namespace dlkit {

enum class CpuCapability { Baseline, Avx2, Avx512, Avx512Bf16 };

// The best instruction set that the processor has and that was compiled, or a lower one named by
// DLKIT_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16, which is read once.
CpuCapability cpu_capability();
const char* cpu_capability_name();

// The best that the processor has, compiled or not.
const char* processor_capability_name();

// Lowers it to the named one from now on (or to the best there is below that); false for an unknown name. For tests.
bool set_cpu_capability(const char* name);

// Kernels use only one instruction of AVX-512 with BF16, which rounds to bf16. Ops on tensors of other types are
// therefore compiled for AVX-512 at most.
template <class Op>
static CpuCapability capability_for(const Op& op) {
  const CpuCapability best = cpu_capability();
  if constexpr (requires { op.dtype; }) {
    if (best == CpuCapability::Avx512Bf16 && op.dtype != DType::BF16) return CpuCapability::Avx512;
  }
  return best;
}

}  // namespace dlkit

#if !defined(DLKIT_ISA)
#define DLKIT_ISA baseline
#define DLKIT_ISA_IS_BASELINE 1
#endif

// Defines void name(const Argument&) as the function of that name in the chosen instruction set's namespace.
#if defined(DLKIT_ISA_IS_BASELINE)
#define DLKIT_CPU_ENTRY(name, function, Argument)                                              \
  DLKIT_IF_AVX2(namespace avx2 { void function(const Argument&); })                            \
  DLKIT_IF_AVX512(namespace avx512 { void function(const Argument&); })                        \
  DLKIT_IF_AVX512_BF16(namespace avx512_bf16 { void function(const Argument&); })              \
  void name(const Argument& op) {                                                              \
    switch (capability_for(op)) {                                                              \
      DLKIT_IF_AVX512_BF16(case CpuCapability::Avx512Bf16 : return avx512_bf16::function(op);) \
      DLKIT_IF_AVX512(case CpuCapability::Avx512 : return avx512::function(op);)               \
      DLKIT_IF_AVX2(case CpuCapability::Avx2 : return avx2::function(op);)                     \
      default:                                                                                 \
        return baseline::function(op);                                                         \
    }                                                                                          \
  }
#else
#define DLKIT_CPU_ENTRY(name, function, Argument)
#endif

#if DLKIT_CPU_SETS >= 1
#define DLKIT_IF_AVX2(...) __VA_ARGS__
#else
#define DLKIT_IF_AVX2(...)
#endif
#if DLKIT_CPU_SETS >= 2
#define DLKIT_IF_AVX512(...) __VA_ARGS__
#else
#define DLKIT_IF_AVX512(...)
#endif
#if DLKIT_CPU_SETS >= 3
#define DLKIT_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define DLKIT_IF_AVX512_BF16(...)
#endif
