// How large an output must be before it is written past the caches.
#pragma once

#include <cstdint>

namespace dlkit {

int64_t streaming_threshold_bytes();

}  // namespace dlkit
