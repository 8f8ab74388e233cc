// A plan reads tensors that an optimizer's groups and state hold. It keeps their addresses and no references, which
// would keep replaced tensors alive. Before each step the containers are walked and must hold the same tensors in the
// same places. A tensor in a container is alive; an address that matches is therefore safe to use.
#include "contents.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace dlkit {
namespace {

constexpr const char* kCapsule = "dlkit._C.contents";

// One object in a container. `local` is the part of a DTensor that is on this process. `layout` says where a
// parameter's elements are, since parameters that overlap are stepped one after the other. An empty entry ends each
// container, which shows when an object moves from one container to the next.
struct Entry {
  const PyObject* key = nullptr;  // in a dict
  const PyObject* object = nullptr;
  const PyTypeObject* type = nullptr;
  const c10::TensorImpl *tensor = nullptr, *local = nullptr;
  uint64_t layout = 0;
};

const c10::TensorImpl* tensor_of(PyObject* object) { return THPVariable_Unpack(object).unsafeGetTensorImpl(); }

uint64_t layout_of(const c10::TensorImpl& tensor) {
  uint64_t hash = uint64_t(c10::typeMetaToScalarType(tensor.dtype())) << 56 | uint64_t(tensor.device_type()) << 48;
  if (tensor.layout() != at::kStrided || !tensor.has_storage() || tensor.has_symbolic_sizes_strides()) return hash;
  hash ^= reinterpret_cast<uint64_t>(tensor.unsafe_storage().unsafeGetStorageImpl());
  hash =
      (hash * 0x9E3779B97F4A7C15 + uint64_t(tensor.storage_offset())) * 0x9E3779B97F4A7C15 + uint64_t(tensor.numel());
  if (tensor.is_contiguous()) return hash;
  for (const int64_t size : tensor.sizes()) hash = hash * 0x9E3779B97F4A7C15 + uint64_t(size) + 1;
  for (const int64_t stride : tensor.strides()) hash = hash * 0x9E3779B97F4A7C15 + uint64_t(stride) + 1;
  return hash;
}

// The `_local_tensor` of a DTensor, or null.
const c10::TensorImpl* local_part(PyObject* object) {
  static PyObject* name = PyUnicode_InternFromString("_local_tensor");
  PyObject* found = PyObject_GetAttr(object, name);
  if (found == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const c10::TensorImpl* tensor = THPVariable_Check(found) ? tensor_of(found) : nullptr;
  Py_DECREF(found);  // the DTensor holds it
  return tensor;
}

Entry entry_of(PyObject* key, PyObject* object) {
  const bool is_parameter = key == nullptr;  // in a list
  Entry entry;
  entry.key = key;
  entry.object = object;
  entry.type = Py_TYPE(object);
  if (!THPVariable_Check(object)) return entry;
  entry.tensor = tensor_of(object);
  if (!THPVariable_CheckExact(object)) entry.local = local_part(object);
  if (is_parameter) entry.layout = layout_of(entry.local != nullptr ? *entry.local : *entry.tensor);
  return entry;
}

// Whether the object is unchanged. A state's dtype, device and shape are not compared: the op checks them at each step.
bool is_same(const Entry& entry, PyObject* key, PyObject* object) {
  if (object != entry.object || key != entry.key || Py_TYPE(object) != entry.type) return false;
  if (entry.tensor == nullptr) return true;
  if (tensor_of(object) != entry.tensor || (entry.local != nullptr && local_part(object) != entry.local)) return false;
  return entry.layout == 0 || layout_of(entry.local != nullptr ? *entry.local : *entry.tensor) == entry.layout;
}

// Calls visit(key or null, object) for what a container holds, in order. Dicts in a dict are walked too: {a: {b: x}}
// gives {b: x}, then x. Returns false also for a container of another type, which counts as changed.
template <class Visit>
bool walk(PyObject* container, const Visit& visit, bool opened = false) {
  if (PyDict_Check(container)) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(container, &position, &key, &value)) {
      if (!visit(key, value)) return false;
      if (PyDict_Check(value) ? !walk(value, visit, true) : !opened && PyMapping_Check(value)) return false;
    }
    return true;
  }
  if (!PyList_Check(container)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
    if (!visit(nullptr, PyList_GET_ITEM(container, i))) return false;
  }
  return true;
}

using Entries = std::vector<Entry>;

void destroy_capsule(PyObject* capsule) { delete static_cast<Entries*>(PyCapsule_GetPointer(capsule, kCapsule)); }

}  // namespace

PyObject* contents(PyObject*, PyObject* containers) {
  HANDLE_TH_ERRORS
  auto entries = std::make_unique<Entries>();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(containers); ++i) {
    walk(PyTuple_GET_ITEM(containers, i), [&](PyObject* key, PyObject* object) {
      entries->push_back(entry_of(key, object));
      return true;
    });
    entries->push_back({});
  }
  PyObject* capsule = PyCapsule_New(entries.get(), kCapsule, destroy_capsule);
  if (capsule != nullptr) entries.release();
  return capsule;
  END_HANDLE_TH_ERRORS
}

PyObject* holds(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject* capsule = PyTuple_GET_SIZE(arguments) > 0 ? PyTuple_GET_ITEM(arguments, 0) : nullptr;
  if (capsule == nullptr || !PyCapsule_IsValid(capsule, kCapsule)) {
    return PyErr_Format(PyExc_TypeError, "expected what contents() returned first");
  }
  const Entries& expected = *static_cast<const Entries*>(PyCapsule_GetPointer(capsule, kCapsule));
  size_t next = 0;
  for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(arguments); ++i) {
    const bool same = walk(PyTuple_GET_ITEM(arguments, i), [&](PyObject* key, PyObject* object) {
      return next < expected.size() && is_same(expected[next++], key, object);
    });
    if (!same || next == expected.size() || expected[next++].object != nullptr) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(next == expected.size());
  END_HANDLE_TH_ERRORS
}

}  // namespace dlkit
