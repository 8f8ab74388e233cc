// dlkit._C: importing it loads the library, which registers the ops with torch; Call calls them; the functions say what
// was built in, and whether an optimizer's dicts still hold what they held.
#include <Python.h>

#include "call.h"
#include "common/cpu/capability.h"

#if !defined(DLKIT_CUDA_ARCHITECTURES)
#define DLKIT_CUDA_ARCHITECTURES ""
#endif

namespace {

PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(dlkit::cpu_capability_name()); }

PyObject* set_cpu_capability(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) return nullptr;
  if (!dlkit::set_cpu_capability(text)) {
    return PyErr_Format(PyExc_ValueError, "expected default, avx2, avx512 or avx512_bf16, got %s", text);
  }
  Py_RETURN_NONE;
}

PyObject* cuda_architectures(PyObject*, PyObject*) { return PyUnicode_FromString(DLKIT_CUDA_ARCHITECTURES); }

// Calls visit(object) for what the containers hold, in order, dicts among it opened: {a: {b: x}} gives {b: x}, then x.
template <class Visit>
bool walk(PyObject* container, const Visit& visit) {
  if (PyDict_Check(container)) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(container, &position, &key, &value)) {
      if (!visit(value) || (PyDict_Check(value) && !walk(value, visit))) return false;
    }
  } else if (PyList_Check(container)) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
      if (!visit(PyList_GET_ITEM(container, i))) return false;
    }
  }
  return true;
}

PyObject* contents(PyObject*, PyObject* containers) {
  PyObject* found = PyList_New(0);
  const auto append = [found](PyObject* object) { return found != nullptr && PyList_Append(found, object) == 0; };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(containers); ++i) {
    if (!walk(PyTuple_GET_ITEM(containers, i), append)) {
      Py_XDECREF(found);
      return nullptr;
    }
  }
  return found;
}

PyObject* holds(PyObject*, PyObject* arguments) {
  PyObject* expected = PyTuple_GET_SIZE(arguments) > 0 ? PyTuple_GET_ITEM(arguments, 0) : nullptr;
  if (expected == nullptr || !PyList_Check(expected)) return PyErr_Format(PyExc_TypeError, "expected a list first");
  Py_ssize_t next = 0;
  const auto same = [&](PyObject* object) {
    return next < PyList_GET_SIZE(expected) && PyList_GET_ITEM(expected, next++) == object;
  };
  for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(arguments); ++i) {
    if (!walk(PyTuple_GET_ITEM(arguments, i), same)) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(next == PyList_GET_SIZE(expected));
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "The instruction set in use: default, avx2, avx512 or avx512_bf16."},
    {"set_cpu_capability", set_cpu_capability, METH_O,
     "Lowers the instruction set in use to the named one. For tests."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS,
     "The CUDA architectures built in, as in TORCH_CUDA_ARCH_LIST; empty in a build without CUDA."},
    {"contents", contents, METH_VARARGS,
     "contents(*containers): a list of all that these lists and dicts hold, dicts of dicts opened."},
    {"holds", holds, METH_VARARGS,
     "holds(expected, *containers): whether contents(*containers) would be the very objects in expected. 5 ns each."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "dlkit._C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  PyObject* type = dlkit::call_type();
  if (made == nullptr || type == nullptr || PyModule_AddObjectRef(made, "Call", type) < 0) Py_CLEAR(made);
  return made;
}
