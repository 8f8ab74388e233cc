// dlkit._C.Call: an op of torch.ops as a Python callable without the cost of torch.ops.
#pragma once

#include <Python.h>

namespace dlkit {

// The type, ready to be put into the module, or nullptr with a Python error set.
PyObject* call_type();

}  // namespace dlkit
