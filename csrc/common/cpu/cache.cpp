#include "cache.h"

#include <algorithm>
#include <fstream>

namespace dlkit {
namespace {

// The size of the last-level cache that one core sees. sysconf reports ten times that on some virtual machines.
int64_t last_level_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size)) return int64_t(32) << 20;
  file >> unit;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
}

}  // namespace

int64_t streaming_threshold_bytes() {
  static const int64_t threshold = std::clamp(last_level_cache_bytes() / 2, int64_t(8) << 20, int64_t(64) << 20);
  return threshold;
}

}  // namespace dlkit
