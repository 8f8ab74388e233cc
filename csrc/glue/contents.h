// What an optimizer's lists and dicts held when a plan was made, and whether they still hold it.
#pragma once

#include <Python.h>

namespace dlkit {

// contents(*containers) and holds(contents, *containers), as Python calls them.
PyObject* contents(PyObject* module, PyObject* containers);
PyObject* holds(PyObject* module, PyObject* arguments);

}  // namespace dlkit
