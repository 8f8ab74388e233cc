#include "cache.h"

#include <unistd.h>

namespace dlkit {

int64_t streaming_threshold_bytes() {
  static const int64_t threshold = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const int64_t last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
    const int64_t last_level = 0;
#endif
    return last_level > 0 ? last_level / 2 : int64_t(16) << 20;
  }();
  return threshold;
}

}  // namespace dlkit
