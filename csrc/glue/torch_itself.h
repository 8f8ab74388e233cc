// What override.cpp must know of dlkit's own calls: torch's functions that they fall back on are torch's own.
#pragma once

namespace dlkit {

// Inside of an op of dlkit, or of its backward, where torch's functions are not to come back to dlkit.
inline thread_local int calls_of_torch_itself = 0;

struct TorchItself {
  TorchItself() { ++calls_of_torch_itself; }
  ~TorchItself() { --calls_of_torch_itself; }
  TorchItself(const TorchItself&) = delete;
  TorchItself& operator=(const TorchItself&) = delete;
};

}  // namespace dlkit
