// Tells override.cpp about dlkit's own calls: when they fall back on torch's functions, torch itself must serve them.
#pragma once

namespace dlkit {

// Above 0 inside an op of dlkit or its backward, where torch's functions must not come back to dlkit.
inline thread_local int calls_of_torch_itself = 0;

struct TorchItself {
  TorchItself() { ++calls_of_torch_itself; }
  ~TorchItself() { --calls_of_torch_itself; }
  TorchItself(const TorchItself&) = delete;
  TorchItself& operator=(const TorchItself&) = delete;
};

}  // namespace dlkit
