// What an op needs to write its own autograd node, which torch names differently from release to release.
#pragma once

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

namespace dlkit {

// Up to torch 2.12 a node is held by shared_ptr, from the release on that has node.h by intrusive_ptr.
template <class T>
auto make_node() {
#if __has_include(<torch/csrc/autograd/node.h>)
  return c10::make_intrusive<T>();
#else
  return std::shared_ptr<T>(new T(), torch::autograd::deleteNode);
#endif
}

}  // namespace dlkit
