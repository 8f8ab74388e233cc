// The launches that a device would refuse, and a kernel's needs, read from the compiled library.
//
// Static shared memory: a kernel's __shared__ variables are static thread_local ones here, and the library's symbol
// table has the size of each beside its kernel's name. Threads: __launch_bounds__ leaves as many bytes before the
// kernel's first instruction as it names threads, and the compiler lists where they begin. ptxas gives no kernel more
// registers than its launch bounds leave a thread (tests/support/check_sass.py checks that), which means that a block
// within them has registers enough.
#pragma once

#include <dlfcn.h>
#include <elf.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

// "+ 0": g++ 12 accepts no constant's bare name here in a template.
#define __launch_bounds__(threads, ...) __attribute__((patchable_function_entry((threads) + 0, (threads) + 0)))

extern "C" {
extern const uintptr_t __start___patchable_function_entries[] __attribute__((visibility("hidden")));
extern const uintptr_t __stop___patchable_function_entries[] __attribute__((visibility("hidden")));
}

namespace cuda_on_cpu {

// The compute capabilities that are built by default; DLKIT_CUDA_ON_CPU_ARCH chooses one.
struct DeviceModel {
  int arch;
  size_t shared_opt_in, shared_per_multiprocessor;  // bytes; a block's includes its kernel's static part
};
constexpr DeviceModel device_models[] = {
    {80, 163 << 10, 164 << 10}, {90, 227 << 10, 228 << 10}, {100, 227 << 10, 228 << 10}, {120, 99 << 10, 100 << 10}};
constexpr size_t shared_default = 48 << 10;  // without opting in, on each of them
constexpr unsigned most_threads_per_block = 1024, most_blocks_x = 0x7fffffff, most_blocks_yz = 65535;

inline const DeviceModel& device_model() {
  const int64_t arch = environment("DLKIT_CUDA_ON_CPU_ARCH", 90);
  for (const DeviceModel& model : device_models) {
    if (model.arch == arch) return model;
  }
  fail("DLKIT_CUDA_ON_CPU_ARCH is %d, expected 80, 90, 100 or 120", int(arch));
}

struct KernelFacts {
  size_t static_shared;
  unsigned most_threads;
};

// The facts of every kernel of the library that `address` is in.
inline std::map<const void*, KernelFacts> read_facts(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0) fail("no library holds the kernel at %p", address);
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.size() < sizeof(Elf64_Ehdr)) fail("%s cannot be read", info.dli_fname);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
  std::map<uintptr_t, std::string> functions;
  std::map<std::string, size_t> variables;  // thread_local ones of functions
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k) {
      const std::string name = names + symbols[k].st_name;
      const auto type = ELF64_ST_TYPE(symbols[k].st_info);
      if (type == STT_FUNC) functions[uintptr_t(info.dli_fbase) + symbols[k].st_value] = name;
      if (type == STT_TLS && name.compare(0, 3, "_ZZ") == 0) variables[name] = symbols[k].st_size;
    }
  }
  if (functions.empty()) fail("%s has no symbol table: is it stripped?", info.dli_fname);

  std::map<const void*, KernelFacts> facts;
  for (const uintptr_t* entry = __start___patchable_function_entries; entry != __stop___patchable_function_entries;
       ++entry) {
    const auto kernel = functions.upper_bound(*entry);
    KernelFacts& found = facts[reinterpret_cast<const void*>(kernel->first)];
    found = {0, unsigned(kernel->first - *entry)};
    // The variable's symbol is _ZZ<function>E<variable>, the function's _Z<function>.
    const std::string prefix = "_Z" + kernel->second.substr(1) + "E";
    auto at = variables.lower_bound(prefix);
    while (at != variables.end() && at->first.compare(0, prefix.size(), prefix) == 0) {
      found.static_shared += (at->second + 15) / 16 * 16;
      at = variables.erase(at);
    }
  }
  if (!variables.empty()) fail("__shared__ outside of a kernel: %s", variables.begin()->first.c_str());
  return facts;
}

inline const KernelFacts& facts_of(const void* kernel) {
  static const std::map<const void*, KernelFacts> facts = read_facts(kernel);
  const auto found = facts.find(kernel);
  if (found == facts.end()) fail("the kernel at %p has no launch bounds", kernel);
  return found->second;
}

}  // namespace cuda_on_cpu
