// Draws inside torch.utils.checkpoint, which restores only torch's default generators before it recomputes.
#pragma once

#include <Python.h>

namespace dlkit {

// watch_draws(replay, record): dlkit.random's functions of that name.
PyObject* watch_draws(PyObject* module, PyObject* arguments);
// From now on draws inside checkpoints are recorded.
PyObject* others_draw_soon(PyObject* module, PyObject*);
// For kernels that draw in Python: replay_draw returns an earlier draw or None, record_draw records a new one.
PyObject* replay_draw(PyObject* module, PyObject* arguments);
PyObject* record_draw(PyObject* module, PyObject* arguments);

}  // namespace dlkit
