// Draws inside torch.utils.checkpoint, which restores torch's default generators alone before it computes again.
#pragma once

#include <Python.h>

namespace dlkit {

// watch_draws(replay, record): dlkit.random's functions of that name.
PyObject* watch_draws(PyObject* module, PyObject* arguments);
// From now on what is drawn inside checkpoints is recorded.
PyObject* others_draw_soon(PyObject* module, PyObject*);
// The same for kernels that draw in Python: what was drawn before, or None; and what was drawn now.
PyObject* replay_draw(PyObject* module, PyObject* arguments);
PyObject* record_draw(PyObject* module, PyObject* arguments);

}  // namespace dlkit
