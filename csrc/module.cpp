// The Python module dlkit._C. Importing it registers the ops with torch. Its type Call calls them; the table below says
// what its functions do.
#include <Python.h>

#include "common/cpu/capability.h"
#include "glue/call.h"
#include "glue/contents.h"
#include "glue/draws.h"
#include "glue/override.h"

#if !defined(DLKIT_CUDA_ARCHITECTURES)
#define DLKIT_CUDA_ARCHITECTURES ""
#endif

namespace {

PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(dlkit::cpu_capability_name()); }

PyObject* processor_capability(PyObject*, PyObject*) {
  return PyUnicode_FromString(dlkit::processor_capability_name());
}

PyObject* set_cpu_capability(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) return nullptr;
  if (!dlkit::set_cpu_capability(text)) {
    return PyErr_Format(PyExc_ValueError, "expected default, avx2, avx512 or avx512_bf16, got %s", text);
  }
  Py_RETURN_NONE;
}

PyObject* cuda_architectures(PyObject*, PyObject*) { return PyUnicode_FromString(DLKIT_CUDA_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "The instruction set in use: default, avx2, avx512 or avx512_bf16."},
    {"processor_capability", processor_capability, METH_NOARGS,
     "The best of these instruction sets that the processor has, whether or not kernels were built for it."},
    {"set_cpu_capability", set_cpu_capability, METH_O,
     "Lowers the instruction set in use to the named one. For tests."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS,
     "The CUDA architectures built in, as in TORCH_CUDA_ARCH_LIST; empty in a build without CUDA."},
    {"contents", dlkit::contents, METH_VARARGS,
     "contents(*containers): which objects these lists and dicts hold, dicts of dicts opened; keeps none of them "
     "alive."},
    {"holds", dlkit::holds, METH_VARARGS,
     "holds(contents, *containers): whether they still hold the same tensors, in the same dtypes and places."},
    {"watch_draws", dlkit::watch_draws, METH_VARARGS,
     "watch_draws(replay, record): whom the ops ask for random numbers inside torch.utils.checkpoint."},
    {"replay_draw", dlkit::replay_draw, METH_VARARGS,
     "replay_draw(kind): (seed, offset) of a draw made before, or None."},
    {"record_draw", dlkit::record_draw, METH_VARARGS, "record_draw(kind, seed, offset): what was drawn just now."},
    {"others_draw", dlkit::others_draw_soon, METH_NOARGS, "There is a random stream that torch does not know."},
    {"override_torch", dlkit::override_torch, METH_O,
     "override_torch(on): torch's functions are served by dlkit's ops."},
    {"override_calls", dlkit::override_calls, METH_NOARGS, "By function of torch: (calls served, calls declined)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "dlkit._C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  PyObject* type = dlkit::call_type();
  if (made == nullptr || type == nullptr || PyModule_AddObjectRef(made, "Call", type) < 0) Py_CLEAR(made);
  return made;
}
