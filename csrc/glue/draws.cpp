// Passes draws from random.h to dlkit.random, which handles torch.utils.checkpoint's Python side.
#include "draws.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include "random.h"

namespace dlkit {
namespace {

PyObject *replay_function = nullptr, *record_function = nullptr;

// Calls function(kind, seed, offset, the pack hooks of saved tensors with the innermost first).
THPObjectPtr call(PyObject* function, Draw draw) {
  THPObjectPtr hooks(PyList_New(0));
  auto stack = at::SavedTensorDefaultHooks::get_tls_state().stack;
  for (; !stack.empty(); stack.pop()) PyList_Append(hooks.get(), stack.top().first.ptr(getPyInterpreter()));
  THPObjectPtr result(PyObject_CallFunction(function, "iKKO", int(draw.from), (unsigned long long)draw.seed,
                                            (unsigned long long)draw.offset, hooks.get()));
  if (!result) throw python_error();
  return result;
}

std::optional<Draw> replay(Draw draw) {
  const pybind11::gil_scoped_acquire gil;
  THPObjectPtr result = call(replay_function, draw);
  if (result.get() == Py_None) return std::nullopt;
  unsigned long long seed = 0, offset = 0;
  if (!PyArg_ParseTuple(result.get(), "KK", &seed, &offset)) throw python_error();
  return Draw{draw.from, seed, offset};
}

void record(Draw draw) {
  const pybind11::gil_scoped_acquire gil;
  call(record_function, draw);
}

}  // namespace

PyObject* watch_draws(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO", &replay_function, &record_function)) return nullptr;
  Py_INCREF(replay_function);
  Py_INCREF(record_function);
  watched_draws = {replay, record};
  Py_RETURN_NONE;
}

PyObject* others_draw_soon(PyObject*, PyObject*) {
  others_draw = true;
  Py_RETURN_NONE;
}

PyObject* replay_draw(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  int from = 0;
  if (!PyArg_ParseTuple(arguments, "i", &from)) return nullptr;
  if (From(from) != From::Default) others_draw = true;
  const auto before = may_be_checkpointed() ? replay({From(from), 0, 0}) : std::nullopt;
  if (!before) Py_RETURN_NONE;
  return Py_BuildValue("KK", (unsigned long long)before->seed, (unsigned long long)before->offset);
  END_HANDLE_TH_ERRORS
}

PyObject* record_draw(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  int from = 0;
  unsigned long long seed = 0, offset = 0;
  if (!PyArg_ParseTuple(arguments, "iKK", &from, &seed, &offset)) return nullptr;
  if (may_be_checkpointed()) record({From(from), seed, offset});
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace dlkit
