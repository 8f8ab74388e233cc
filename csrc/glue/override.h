// dlkit.override(): while it is on, dlkit's ops serve torch's own functions.
#pragma once

#include <Python.h>

namespace dlkit {

// override_torch(on) and override_calls(), as Python calls them.
PyObject* override_torch(PyObject* module, PyObject* on);
PyObject* override_calls(PyObject* module, PyObject*);

}  // namespace dlkit
