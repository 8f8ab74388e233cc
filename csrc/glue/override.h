// dlkit.override(): torch's functions served by dlkit's ops, while it is on.
#pragma once

#include <Python.h>

namespace dlkit {

// override_torch(on) and override_calls(), as Python calls them.
PyObject* override_torch(PyObject* module, PyObject* on);
PyObject* override_calls(PyObject* module, PyObject*);

}  // namespace dlkit
