// Records the contents of an optimizer's lists and dicts when a plan is made, and checks later that they are the same.
#pragma once

#include <Python.h>

namespace dlkit {

// contents(*containers) and holds(contents, *containers), as Python calls them.
PyObject* contents(PyObject* module, PyObject* containers);
PyObject* holds(PyObject* module, PyObject* arguments);

}  // namespace dlkit
