// torch.ops resolves the overload and each argument's type at every call, through Python and pybind11: 1 us, where a
// whole LayerNorm of 16 elements takes 3. Here an op's schema is read once. A call whose arguments match the schema
// goes straight to the dispatcher, and autograd, modes and transforms see it as usual; any other (subclasses of Tensor,
// torch function modes, tracing, wrong types) is passed to torch.ops unchanged.
#include "call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <structmember.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <optional>
#include <string>
#include <vector>

namespace dlkit {
namespace {

using c10::IValue;
using Stack = std::vector<IValue>;

enum class Kind { Tensor, Float, Int, Bool, Ints, Generator };

struct Parameter {
  Kind kind;
  bool optional;
  bool keyword;
  PyObject* name;
  std::optional<IValue> missing;
};

std::optional<Kind> kind_of(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::TensorType:
      return Kind::Tensor;
    case c10::TypeKind::FloatType:
      return Kind::Float;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      return Kind::Int;
    case c10::TypeKind::BoolType:
      return Kind::Bool;
    case c10::TypeKind::GeneratorType:
      return Kind::Generator;
    case c10::TypeKind::ListType:
      return type.containedType(0)->kind() == c10::TypeKind::SymIntType ? std::optional(Kind::Ints) : std::nullopt;
    default:
      return std::nullopt;
  }
}

struct Call {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* overload;
  c10::OperatorHandle* op;
  std::vector<Parameter>* parameters;
};

// Pushes `object`, or returns false where it does not match the schema or torch.ops must handle it.
bool push(Stack& stack, const Parameter& parameter, PyObject* object) {
  if (object == Py_None) {
    if (parameter.optional) stack.emplace_back();
    return parameter.optional;
  }
  switch (parameter.kind) {
    case Kind::Tensor:
      if (!THPVariable_CheckExact(object)) return false;
      stack.emplace_back(THPVariable_Unpack(object));
      return true;
    case Kind::Float:
      if (!PyFloat_CheckExact(object)) return false;
      stack.emplace_back(PyFloat_AS_DOUBLE(object));
      return true;
    case Kind::Int: {
      if (!PyLong_CheckExact(object)) return false;
      int overflow = 0;
      stack.emplace_back(int64_t(PyLong_AsLongLongAndOverflow(object, &overflow)));
      return overflow == 0;
    }
    case Kind::Bool:
      if (!PyBool_Check(object)) return false;
      stack.emplace_back(object == Py_True);
      return true;
    case Kind::Ints: {
      if (!PyTuple_Check(object) && !PyList_Check(object)) return false;  // torch.Size is a tuple
      c10::List<int64_t> list;
      list.reserve(size_t(PySequence_Fast_GET_SIZE(object)));
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
        PyObject* item = PySequence_Fast_GET_ITEM(object, i);
        int overflow = 0;
        if (!PyLong_CheckExact(item)) return false;
        list.push_back(PyLong_AsLongLongAndOverflow(item, &overflow));
        if (overflow != 0) return false;
      }
      stack.emplace_back(std::move(list));
      return true;
    }
    case Kind::Generator:
      if (!THPGenerator_Check(object)) return false;
      stack.emplace_back(reinterpret_cast<THPGenerator*>(object)->cdata);
      return true;
  }
  return false;
}

PyObject* call_overload(const Call& self, PyObject* const* args, Py_ssize_t count) {
  Py_ssize_t positional = 0;
  while (positional < count && size_t(positional) < self.parameters->size() &&
         !(*self.parameters)[size_t(positional)].keyword) {
    ++positional;
  }
  PyObject* names = nullptr;
  if (size_t(count) <= self.parameters->size() && positional < count) {
    names = PyTuple_New(count - positional);
    if (names == nullptr) return nullptr;
    for (Py_ssize_t i = positional; i < count; ++i) {
      PyTuple_SET_ITEM(names, i - positional, Py_NewRef((*self.parameters)[size_t(i)].name));
    }
  } else {
    positional = count;  // too many: torch.ops raises
  }
  PyObject* result = PyObject_Vectorcall(self.overload, args, size_t(positional), names);
  Py_XDECREF(names);
  return result;
}

PyObject* wrap(const Stack& stack) {
  if (stack.size() == 1) return THPVariable_Wrap(stack[0].toTensor());
  PyObject* tuple = PyTuple_New(Py_ssize_t(stack.size()));
  for (size_t i = 0; tuple != nullptr && i < stack.size(); ++i) {
    PyObject* item = THPVariable_Wrap(stack[i].toTensor());
    if (item == nullptr) {
      Py_CLEAR(tuple);
    } else {
      PyTuple_SET_ITEM(tuple, Py_ssize_t(i), item);
    }
  }
  return tuple;
}

// Takes only positional arguments, in the schema's order, even those after its `*`.
PyObject* vectorcall(PyObject* object, PyObject* const* args, size_t flagged, PyObject* names) {
  HANDLE_TH_ERRORS
  const Call& self = *reinterpret_cast<Call*>(object);
  const Py_ssize_t count = PyVectorcall_NARGS(flagged);
  if (names != nullptr && PyTuple_GET_SIZE(names) > 0) {
    return PyErr_Format(PyExc_TypeError, "dlkit._C.Call takes its arguments by position");
  }
  const std::vector<Parameter>& parameters = *self.parameters;
  if (size_t(count) > parameters.size() || at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing()) {
    return call_overload(self, args, count);
  }
  Stack stack;
  stack.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (Py_ssize_t(i) < count) {
      if (!push(stack, parameters[i], args[i])) return call_overload(self, args, count);
    } else if (parameters[i].missing) {
      stack.push_back(*parameters[i].missing);
    } else {
      return call_overload(self, args, count);
    }
  }
  {
    const pybind11::gil_scoped_release no_gil;
    self.op->callBoxed(stack);
  }
  return wrap(stack);
  END_HANDLE_TH_ERRORS
}

PyObject* construct(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject* overload = nullptr;
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "Os", &overload, &name)) return nullptr;
  const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  std::vector<Parameter> parameters;
  for (const c10::Argument& argument : op.schema().arguments()) {
    c10::TypePtr type = argument.real_type();
    const bool optional = type->kind() == c10::TypeKind::OptionalType;
    if (optional) type = type->containedType(0);
    const std::optional<Kind> kind = kind_of(*type);
    if (!kind) return PyErr_Format(PyExc_TypeError, "Call: %s has an argument of type %s", name, type->str().c_str());
    PyObject* interned = PyUnicode_InternFromString(argument.name().c_str());
    if (interned == nullptr) return nullptr;
    parameters.push_back({*kind, optional, argument.kwarg_only(), interned, argument.default_value()});
  }
  for (const c10::Argument& returned : op.schema().returns()) {
    if (returned.type()->kind() != c10::TypeKind::TensorType) {
      return PyErr_Format(PyExc_TypeError, "Call: %s returns %s", name, returned.type()->str().c_str());
    }
  }
  Call* self = reinterpret_cast<Call*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->vectorcall = vectorcall;
  self->overload = Py_NewRef(overload);
  self->op = new c10::OperatorHandle(op);
  self->parameters = new std::vector<Parameter>(std::move(parameters));
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

void destroy_call(PyObject* object) {
  Call* self = reinterpret_cast<Call*>(object);
  for (const Parameter& parameter : *self->parameters) Py_DECREF(parameter.name);
  delete self->parameters;
  delete self->op;
  Py_DECREF(self->overload);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

}  // namespace

PyObject* call_type() {
  static PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Call, vectorcall), READONLY, nullptr},
                                  {nullptr, 0, 0, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_doc,
       const_cast<char*>("Call(overload, name): torch.ops' overload of that name, its arguments by position.")},
      {Py_tp_new, reinterpret_cast<void*>(construct)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy_call)},
      {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
      {Py_tp_members, members},
      {0, nullptr}};
  static PyType_Spec spec{"dlkit._C.Call", sizeof(Call), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace dlkit
